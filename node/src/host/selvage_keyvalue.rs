//! `selvage:keyvalue`: what our stores can do and `wasi:keyvalue` has no words for.

use bytes::Bytes;
use selvage_sync::store::{LIST_MAX, Terms};
use wasmtime::component::{HasSelf, Linker, Resource};

use super::State;
use super::stores::{Store, StoreError};

/// Longest life of a value, milliseconds: 10 years.
const TTL_MS_MAX: u64 = 315_360_000_000;

mod bindings {
    wasmtime::component::bindgen!({
        path: "wit/selvage-keyvalue.wit",
        imports: { default: async | trappable },
        with: { "selvage:keyvalue/store.bucket": crate::host::stores::Store },
        trappable_error_type: { "selvage:keyvalue/store.error" => crate::host::stores::StoreError },
    });
}
use bindings::selvage::keyvalue::store;

/// Links the interface.
pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    bindings::Imports::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
}

impl State {
    fn bucket(&self, bucket: &Resource<Store>) -> Result<Store, StoreError> {
        Ok(self.table.get(bucket)?.clone())
    }
}

/// The instant at which a life that begins now ends.
fn expires_ms(ttl_ms: Option<u64>) -> Result<Option<u64>, StoreError> {
    let Some(ttl_ms) = ttl_ms else { return Ok(None) };
    if ttl_ms == 0 || ttl_ms > TTL_MS_MAX {
        return Err(StoreError::Ttl { ttl_ms, max: TTL_MS_MAX });
    }
    Ok(Some(selvage_sync::store::now_ms().saturating_add(ttl_ms)))
}

fn terms(terms: store::Terms) -> Result<Terms, StoreError> {
    Ok(Terms { expires_ms: expires_ms(terms.ttl_ms)?, metadata: Bytes::from(terms.metadata) })
}

impl store::Host for State {
    async fn open(&mut self, label: String) -> Result<Resource<Store>, StoreError> {
        let store = Store::open(&self.grants, &label)?;
        Ok(self.table.push(store)?)
    }

    fn convert_error(&mut self, error: StoreError) -> wasmtime::Result<store::Error> {
        match error {
            StoreError::NoSuchStore => Ok(store::Error::NoSuchStore),
            StoreError::AccessDenied => Ok(store::Error::AccessDenied),
            StoreError::Handle(error) => Err(error.into()),
            error => Ok(store::Error::Other(error.to_string())),
        }
    }
}

impl store::HostBucket for State {
    async fn get(&mut self, bucket: Resource<Store>, key: String) -> Result<Option<store::Entry>, StoreError> {
        let Some(kept) = self.bucket(&bucket)?.latest(&key).await? else { return Ok(None) };
        let now_ms = selvage_sync::store::now_ms();
        Ok(Some(store::Entry {
            value: kept.value.into(),
            metadata: kept.terms.metadata.into(),
            ttl_ms: kept.terms.expires_ms.map(|expires| expires.saturating_sub(now_ms)),
            version: kept.version,
        }))
    }

    async fn set(
        &mut self,
        bucket: Resource<Store>,
        key: String,
        value: Vec<u8>,
        on: store::Terms,
    ) -> Result<String, StoreError> {
        let (store, terms) = (self.bucket(&bucket)?, terms(on)?);
        store.set_on(&key, value, terms).await
    }

    async fn set_if(
        &mut self,
        bucket: Resource<Store>,
        key: String,
        value: Vec<u8>,
        on: store::Terms,
        condition: store::Condition,
    ) -> Result<Option<String>, StoreError> {
        let (store, terms) = (self.bucket(&bucket)?, terms(on)?);
        let seen = match &condition {
            store::Condition::Absent => None,
            store::Condition::Version(version) => Some(version.as_str()),
        };
        store.set_if(&key, value, terms, seen).await
    }

    async fn delete(&mut self, bucket: Resource<Store>, key: String) -> Result<(), StoreError> {
        self.bucket(&bucket)?.delete(&key).await
    }

    async fn increment(
        &mut self,
        bucket: Resource<Store>,
        key: String,
        delta: i64,
        ttl_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        let (store, expires_ms) = (self.bucket(&bucket)?, expires_ms(ttl_ms)?);
        store.increment_until(&key, delta, expires_ms).await
    }

    async fn list_keys(
        &mut self,
        bucket: Resource<Store>,
        prefix: String,
        cursor: Option<String>,
        limit: u32,
    ) -> Result<store::Page, StoreError> {
        let limit = usize::try_from(limit).unwrap_or(LIST_MAX).clamp(1, LIST_MAX);
        let keys = self.bucket(&bucket)?.list(&prefix, cursor.as_deref(), limit).await?;
        let cursor = keys.last().filter(|_| keys.len() == limit).cloned();
        Ok(store::Page { keys, cursor })
    }

    async fn drop(&mut self, bucket: Resource<Store>) -> wasmtime::Result<()> {
        self.table.delete(bucket)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::store::{Condition, Host as _, HostBucket as _};
    use super::*;
    use crate::host::tests::state;

    fn on(ttl_ms: Option<u64>, metadata: &[u8]) -> store::Terms {
        store::Terms { ttl_ms, metadata: metadata.to_vec() }
    }

    async fn bucket(state: &mut State) -> Resource<Store> {
        state.open("default".into()).await.unwrap()
    }

    fn again(bucket: &Resource<Store>) -> Resource<Store> {
        Resource::new_borrow(bucket.rep())
    }

    #[tokio::test]
    async fn a_value_comes_back_on_its_terms() {
        let (mut state, _dir) = state(&["default"]).await;
        let bucket = bucket(&mut state).await;
        let set = state.set(again(&bucket), "k".into(), b"v".to_vec(), on(Some(60_000), b"meta")).await.unwrap();
        let entry = state.get(again(&bucket), "k".into()).await.unwrap().unwrap();
        assert_eq!((entry.value.as_slice(), entry.metadata.as_slice()), (&b"v"[..], &b"meta"[..]));
        assert!(entry.ttl_ms.is_some_and(|ttl| (1..=60_000).contains(&ttl)), "{:?}", entry.ttl_ms);
        assert_eq!(entry.version, set);
        // The other interfaces see the value alone.
        let plain = state.bucket(&bucket).unwrap();
        assert_eq!(plain.get("k").await.unwrap(), Some(b"v".to_vec()));
        plain.set("k", b"w".to_vec()).await.unwrap();
        let entry = state.get(again(&bucket), "k".into()).await.unwrap().unwrap();
        assert_eq!((entry.value.as_slice(), entry.metadata.as_slice(), entry.ttl_ms), (&b"w"[..], &b""[..], None));
        let large = vec![7; 3 << 20];
        state.set(again(&bucket), "large".into(), large.clone(), on(None, b"meta")).await.unwrap();
        let entry = state.get(again(&bucket), "large".into()).await.unwrap().unwrap();
        assert!(entry.value == large && entry.metadata == b"meta");
    }

    #[tokio::test]
    async fn a_condition_is_of_the_very_write_that_was_read() {
        let (mut state, _dir) = state(&["default"]).await;
        let bucket = bucket(&mut state).await;
        let set_if = async |state: &mut State, value: &[u8], condition| {
            state.set_if(again(&bucket), "k".into(), value.to_vec(), on(None, b""), condition).await
        };
        let first = set_if(&mut state, b"1", Condition::Absent).await.unwrap().unwrap();
        assert_eq!(set_if(&mut state, b"2", Condition::Absent).await.unwrap(), None);
        let second = set_if(&mut state, b"1", Condition::Version(first.clone())).await.unwrap().unwrap();
        // The value is the same again, the write is not.
        assert_eq!(set_if(&mut state, b"3", Condition::Version(first)).await.unwrap(), None);
        assert!(set_if(&mut state, b"3", Condition::Version(second)).await.unwrap().is_some());
        let other = set_if(&mut state, b"4", Condition::Version("no version".into())).await;
        assert!(matches!(other, Err(StoreError::Version)));
        state.delete(again(&bucket), "k".into()).await.unwrap();
        assert!(set_if(&mut state, b"5", Condition::Absent).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn terms_beyond_their_bounds_are_refused_as_values() {
        let (mut state, _dir) = state(&["default"]).await;
        assert!(matches!(state.open("other".into()).await, Err(StoreError::AccessDenied)));
        let bucket = bucket(&mut state).await;
        for ttl_ms in [0, TTL_MS_MAX + 1] {
            let refused = state.set(again(&bucket), "k".into(), vec![1], on(Some(ttl_ms), b"")).await;
            assert!(matches!(refused, Err(StoreError::Ttl { .. })), "{ttl_ms}");
            let refused = state.increment(again(&bucket), "k".into(), 1, Some(ttl_ms)).await;
            assert!(matches!(refused, Err(StoreError::Ttl { .. })), "{ttl_ms}");
        }
        let long = vec![1; selvage_sync::store::METADATA_BYTES_MAX + 1];
        let refused = state.set(again(&bucket), "k".into(), vec![1], on(None, &long)).await.unwrap_err();
        let told = state.convert_error(refused).unwrap();
        assert!(
            matches!(&told, store::Error::Other(why) if why == "metadata of 1025 bytes, the limit is 1024"),
            "{told:?}"
        );
        let most = state.set(again(&bucket), "k".into(), vec![1], on(Some(TTL_MS_MAX), &long[1..])).await;
        assert!(most.is_ok());
    }

    #[tokio::test]
    async fn a_list_goes_on_within_its_prefix() {
        let (mut state, _dir) = state(&["default"]).await;
        let bucket = bucket(&mut state).await;
        for key in ["a/1", "a/2", "a/3", "b/1"] {
            state.increment(again(&bucket), key.into(), 2, Some(60_000)).await.unwrap();
        }
        assert_eq!(state.increment(again(&bucket), "a/1".into(), 3, None).await.unwrap(), 5);
        let first = state.list_keys(again(&bucket), "a/".into(), None, 2).await.unwrap();
        assert_eq!(first.keys, ["a/1", "a/2"]);
        let rest = state.list_keys(again(&bucket), "a/".into(), first.cursor, 2).await.unwrap();
        assert_eq!((rest.keys, rest.cursor), (vec!["a/3".to_owned()], None));
    }
}
