//! A component's variables: `fermyon:spin/variables@2.0.0`, `spin:variables@3.0.0`, and `wasi:config/store` in the two
//! versions that guests are built for.
//!
//! The values were settled at activation; a guest reads those of its own component only.

use selvage_config::app::variables::is_variable_name;
use wasmtime::component::{Accessor, HasSelf, Linker};

use super::State;
use super::spin_key_value::variables_v2 as v2;

mod spin3 {
    wasmtime::component::bindgen!({ path: "wit/spin-variables-3.wit", imports: { default: trappable } });
}
mod config_rc1 {
    wasmtime::component::bindgen!({ path: "wit/wasi-config-rc1.wit" });
}
mod config_draft {
    wasmtime::component::bindgen!({ path: "wit/wasi-config-draft.wit" });
}
use config_draft::wasi::config::store as draft;
use config_rc1::wasi::config::store as rc1;
use spin3::spin::variables::variables as v3;

/// All but `spin:variables@3.0.0`.
pub(super) fn link_p2(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    v2::add_to_linker::<_, HasSelf<State>>(linker, |state| state)?;
    rc1::add_to_linker::<_, HasSelf<State>>(linker, |state| state)?;
    draft::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

/// `spin:variables/variables@3.0.0`.
pub(super) fn link_p3(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    v3::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

/// What a read of a variable comes to.
enum Read {
    Value(String),
    InvalidName(String),
    Undefined(String),
}

impl State {
    fn variable(&self, name: String) -> Read {
        match self.grants.variables.get(&name) {
            Some(value) => Read::Value(value.clone()),
            None if is_variable_name(&name) => Read::Undefined(name),
            None => Read::InvalidName(name),
        }
    }

    fn variables(&self) -> Vec<(String, String)> {
        self.grants.variables.iter().map(|(name, value)| (name.clone(), value.clone())).collect()
    }
}

impl v2::Host for State {
    fn get(&mut self, name: String) -> wasmtime::Result<Result<String, v2::Error>> {
        Ok(match self.variable(name) {
            Read::Value(value) => Ok(value),
            Read::InvalidName(name) => Err(v2::Error::InvalidName(name)),
            Read::Undefined(name) => Err(v2::Error::Undefined(name)),
        })
    }
}

impl v3::Host for State {}

impl<T: Send> v3::HostWithStore<T> for HasSelf<State> {
    async fn get(accessor: &Accessor<T, Self>, name: String) -> wasmtime::Result<Result<String, v3::Error>> {
        Ok(match accessor.with(|mut access| access.get().variable(name)) {
            Read::Value(value) => Ok(value),
            Read::InvalidName(name) => Err(v3::Error::InvalidName(name)),
            Read::Undefined(name) => Err(v3::Error::Undefined(name)),
        })
    }
}

impl rc1::Host for State {
    fn get(&mut self, key: String) -> Result<Option<String>, rc1::Error> {
        Ok(self.grants.variables.get(&key).cloned())
    }

    fn get_all(&mut self) -> Result<Vec<(String, String)>, rc1::Error> {
        Ok(self.variables())
    }
}

impl draft::Host for State {
    fn get(&mut self, key: String) -> Result<Option<String>, draft::Error> {
        Ok(self.grants.variables.get(&key).cloned())
    }

    fn get_all(&mut self) -> Result<Vec<(String, String)>, draft::Error> {
        Ok(self.variables())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::tests::state;

    #[tokio::test]
    async fn a_variable_is_the_same_by_every_interface() {
        let (mut state, _dir) = state(&[]).await;
        assert_eq!(v2::Host::get(&mut state, "greeting".into()).unwrap().unwrap(), "Moin");
        assert_eq!(rc1::Host::get(&mut state, "greeting".into()).unwrap(), Some("Moin".into()));
        assert_eq!(draft::Host::get_all(&mut state).unwrap(), [("greeting".to_owned(), "Moin".to_owned())]);
    }

    #[tokio::test]
    async fn a_variable_that_is_not_there_is_a_value_that_says_so() {
        let (mut state, _dir) = state(&[]).await;
        let undefined = v2::Host::get(&mut state, "other".into()).unwrap();
        assert!(matches!(undefined, Err(v2::Error::Undefined(name)) if name == "other"));
        let invalid = v2::Host::get(&mut state, "No Name".into()).unwrap();
        assert!(matches!(invalid, Err(v2::Error::InvalidName(name)) if name == "No Name"));
        assert_eq!(rc1::Host::get(&mut state, "other".into()).unwrap(), None);
    }
}
