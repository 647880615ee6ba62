//! Spin's key-value interfaces: `fermyon:spin/key-value@2.0.0`, and `spin:key-value@3.0.0` for WASI 0.3.

use wasmtime::component::{Accessor, FutureReader, HasSelf, Linker, Resource, StreamReader};

use super::State;
use super::stores::{Store, StoreError};

mod spin2 {
    wasmtime::component::bindgen!({
        path: "wit/fermyon-spin-2.wit",
        imports: {
            "fermyon:spin/variables": trappable,
            default: async | trappable,
        },
        with: { "fermyon:spin/key-value.store": crate::host::stores::Store },
        trappable_error_type: { "fermyon:spin/key-value.error" => crate::host::stores::StoreError },
    });
}
mod spin3 {
    wasmtime::component::bindgen!({
        path: "wit/spin-key-value-3.wit",
        imports: { default: trappable },
        with: { "spin:key-value/key-value.store": crate::host::stores::Store },
        trappable_error_type: { "spin:key-value/key-value.error" => crate::host::stores::StoreError },
    });
}
use spin2::fermyon::spin::key_value as v2;
pub(super) use spin2::fermyon::spin::variables as variables_v2;
use spin3::spin::key_value::key_value as v3;

/// `fermyon:spin/key-value@2.0.0`.
pub(super) fn link_p2(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    v2::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

/// `spin:key-value/key-value@3.0.0`.
pub(super) fn link_p3(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    v3::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

impl State {
    fn spin_store(&self, store: &Resource<Store>) -> Result<Store, StoreError> {
        Ok(self.table.get(store)?.clone())
    }
}

impl v2::Host for State {
    fn convert_error(&mut self, error: StoreError) -> wasmtime::Result<v2::Error> {
        match error {
            StoreError::NoSuchStore => Ok(v2::Error::NoSuchStore),
            StoreError::AccessDenied => Ok(v2::Error::AccessDenied),
            StoreError::Handle(error) => Err(error.into()),
            error => Ok(v2::Error::Other(error.to_string())),
        }
    }
}

impl v2::HostStore for State {
    async fn open(&mut self, label: String) -> Result<Resource<Store>, StoreError> {
        let store = Store::open(&self.grants, &label)?;
        Ok(self.table.push(store)?)
    }

    async fn get(&mut self, store: Resource<Store>, key: String) -> Result<Option<Vec<u8>>, StoreError> {
        self.spin_store(&store)?.get(&key).await
    }

    async fn set(&mut self, store: Resource<Store>, key: String, value: Vec<u8>) -> Result<(), StoreError> {
        self.spin_store(&store)?.set(&key, value).await
    }

    async fn delete(&mut self, store: Resource<Store>, key: String) -> Result<(), StoreError> {
        self.spin_store(&store)?.delete(&key).await
    }

    async fn exists(&mut self, store: Resource<Store>, key: String) -> Result<bool, StoreError> {
        self.spin_store(&store)?.exists(&key).await
    }

    async fn get_keys(&mut self, store: Resource<Store>) -> Result<Vec<String>, StoreError> {
        self.spin_store(&store)?.keys().await
    }

    async fn drop(&mut self, store: Resource<Store>) -> wasmtime::Result<()> {
        self.table.delete(store)?;
        Ok(())
    }
}

impl v3::Host for State {
    fn convert_error(&mut self, error: StoreError) -> wasmtime::Result<v3::Error> {
        to_v3(error)
    }
}

fn to_v3(error: StoreError) -> wasmtime::Result<v3::Error> {
    match error {
        StoreError::NoSuchStore => Ok(v3::Error::NoSuchStore),
        StoreError::AccessDenied => Ok(v3::Error::AccessDenied),
        StoreError::Handle(error) => Err(error.into()),
        error => Ok(v3::Error::Other(error.to_string())),
    }
}

impl v3::HostStore for State {
    fn drop(&mut self, store: Resource<Store>) -> wasmtime::Result<()> {
        self.table.delete(store)?;
        Ok(())
    }
}

fn store_of<T: Send>(accessor: &Accessor<T, HasSelf<State>>, store: &Resource<Store>) -> Result<Store, StoreError> {
    accessor.with(|mut access| access.get().spin_store(store))
}

impl<T: Send> v3::HostStoreWithStore<T> for HasSelf<State> {
    async fn open(accessor: &Accessor<T, Self>, label: String) -> Result<Resource<Store>, StoreError> {
        accessor.with(|mut access| {
            let state = access.get();
            let store = Store::open(&state.grants, &label)?;
            Ok(state.table.push(store)?)
        })
    }

    async fn get(
        accessor: &Accessor<T, Self>,
        store: Resource<Store>,
        key: String,
    ) -> Result<Option<Vec<u8>>, StoreError> {
        store_of(accessor, &store)?.get(&key).await
    }

    async fn set(
        accessor: &Accessor<T, Self>,
        store: Resource<Store>,
        key: String,
        value: Vec<u8>,
    ) -> Result<(), StoreError> {
        store_of(accessor, &store)?.set(&key, value).await
    }

    async fn delete(accessor: &Accessor<T, Self>, store: Resource<Store>, key: String) -> Result<(), StoreError> {
        store_of(accessor, &store)?.delete(&key).await
    }

    async fn exists(accessor: &Accessor<T, Self>, store: Resource<Store>, key: String) -> Result<bool, StoreError> {
        store_of(accessor, &store)?.exists(&key).await
    }

    async fn get_keys(
        accessor: &Accessor<T, Self>,
        store: Resource<Store>,
    ) -> wasmtime::Result<(StreamReader<String>, FutureReader<Result<(), v3::Error>>)> {
        let (keys, end) = match store_of(accessor, &store)?.keys().await {
            Ok(keys) => (keys, Ok(())),
            Err(error) => (Vec::new(), Err(to_v3(error)?)),
        };
        accessor.with(|mut access| {
            let keys = StreamReader::new(&mut access, keys)?;
            let end = FutureReader::new(&mut access, async move { wasmtime::error::Ok(end) })?;
            Ok((keys, end))
        })
    }
}

#[cfg(test)]
mod tests {
    use wasmtime::Store as WasmStore;

    use super::*;
    use crate::engine::{EngineOptions, Engines, Generation};
    use crate::host::tests::state;

    #[tokio::test]
    async fn a_store_is_used_through_the_synchronous_interface() {
        let (mut state, _dir) = state(&["default"]).await;
        assert!(matches!(v2::HostStore::open(&mut state, "other".into()).await, Err(StoreError::AccessDenied)));
        assert!(matches!(v2::HostStore::open(&mut state, "no label".into()).await, Err(StoreError::NoSuchStore)));
        let open = async |state: &mut State| v2::HostStore::open(state, "default".into()).await.unwrap();
        let store = open(&mut state).await;
        let again = || Resource::new_borrow(store.rep());
        v2::HostStore::set(&mut state, again(), "b".into(), b"2".to_vec()).await.unwrap();
        v2::HostStore::set(&mut state, again(), "a".into(), b"1".to_vec()).await.unwrap();
        assert_eq!(v2::HostStore::get(&mut state, again(), "a".into()).await.unwrap(), Some(b"1".to_vec()));
        assert_eq!(v2::HostStore::get_keys(&mut state, again()).await.unwrap(), ["a", "b"]);
        v2::HostStore::delete(&mut state, again(), "a".into()).await.unwrap();
        assert!(!v2::HostStore::exists(&mut state, again(), "a".into()).await.unwrap());
        let gone = again();
        v2::HostStore::drop(&mut state, store).await.unwrap();
        assert!(matches!(v2::HostStore::get(&mut state, gone, "a".into()).await, Err(StoreError::Handle(_))));
    }

    #[tokio::test]
    async fn a_store_is_used_through_the_asynchronous_interface() {
        type Host = HasSelf<State>;
        let (state, _dir) = state(&["default"]).await;
        let engines = Engines::new(&EngineOptions::of_instances(1)).unwrap();
        let mut store = WasmStore::new(engines.engine(Generation::P3), state);
        let used = store.run_concurrent(async |accessor| {
            let accessor = &accessor.with_getter::<Host>(|state| state);
            let denied = <Host as v3::HostStoreWithStore<State>>::open(accessor, "other".into()).await;
            assert!(matches!(denied, Err(StoreError::AccessDenied)));
            let store = <Host as v3::HostStoreWithStore<State>>::open(accessor, "default".into()).await.unwrap();
            let again = || Resource::new_borrow(store.rep());
            <Host as v3::HostStoreWithStore<State>>::set(accessor, again(), "a".into(), vec![1]).await.unwrap();
            let got = <Host as v3::HostStoreWithStore<State>>::get(accessor, again(), "a".into()).await.unwrap();
            assert_eq!(got, Some(vec![1]));
            assert!(<Host as v3::HostStoreWithStore<State>>::exists(accessor, again(), "a".into()).await.unwrap());
            let (mut keys, mut end) =
                <Host as v3::HostStoreWithStore<State>>::get_keys(accessor, again()).await.unwrap();
            accessor.with(|mut access| keys.close(&mut access).and_then(|()| end.close(&mut access))).unwrap();
            <Host as v3::HostStoreWithStore<State>>::delete(accessor, again(), "a".into()).await.unwrap();
            let got = <Host as v3::HostStoreWithStore<State>>::get(accessor, again(), "a".into()).await.unwrap();
            assert_eq!(got, None);
        });
        used.await.unwrap();
    }
}
