//! `wasi:keyvalue`, in both drafts that guests are built for: 0.2.0-draft and 0.2.0-draft2.

use wasmtime::component::{Linker, Resource};

use super::State;
use super::stores::{Store, StoreError};

/// Pages that a guest may list from one bucket of the first draft: their cursor is a number, so the place that each
/// stands for has to be kept.
const MARKS_MAX: usize = 1_000;

/// A bucket: a granted store, and where its numbered cursors point.
#[expect(unreachable_pub, reason = "the generated bindings re-export it")]
pub struct Bucket {
    store: Store,
    marks: Vec<String>,
}

/// A value that was seen, for compare-and-swap.
#[expect(unreachable_pub, reason = "the generated bindings re-export it")]
pub struct Cas {
    store: Store,
    key: String,
    seen: Option<Vec<u8>>,
}

impl Cas {
    async fn look(store: Store, key: String) -> Result<Self, StoreError> {
        let seen = store.latest(&key).await?.map(|kept| kept.value.into());
        Ok(Self { store, key, seen })
    }
}

/// Links both drafts.
pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    draft::link(linker)?;
    draft2::link(linker)
}

impl State {
    fn open_bucket(&mut self, identifier: &str) -> Result<Resource<Bucket>, StoreError> {
        let store = Store::open(&self.grants, identifier)?;
        Ok(self.table.push(Bucket { store, marks: Vec::new() })?)
    }

    /// The store behind a bucket: a copy, because a write awaits while the table must stay free.
    fn store(&self, bucket: &Resource<Bucket>) -> Result<Store, StoreError> {
        Ok(self.table.get(bucket)?.store.clone())
    }
}

mod draft {
    use wasmtime::component::{HasSelf, Linker, Resource};

    use super::{Bucket, MARKS_MAX, State, StoreError};

    mod bindings {
        wasmtime::component::bindgen!({
            path: "wit/wasi-keyvalue-draft.wit",
            imports: { default: async | trappable },
            with: { "wasi:keyvalue/store.bucket": crate::host::keyvalue::Bucket },
            trappable_error_type: { "wasi:keyvalue/store.error" => crate::host::stores::StoreError },
        });
    }
    pub(super) use bindings::wasi::keyvalue::{atomics, batch, store};

    pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
        bindings::Imports::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
    }

    impl store::Host for State {
        async fn open(&mut self, identifier: String) -> Result<Resource<Bucket>, StoreError> {
            self.open_bucket(&identifier)
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
        async fn get(&mut self, bucket: Resource<Bucket>, key: String) -> Result<Option<Vec<u8>>, StoreError> {
            self.store(&bucket)?.get(&key).await
        }

        async fn set(&mut self, bucket: Resource<Bucket>, key: String, value: Vec<u8>) -> Result<(), StoreError> {
            self.store(&bucket)?.set(&key, value).await
        }

        async fn delete(&mut self, bucket: Resource<Bucket>, key: String) -> Result<(), StoreError> {
            self.store(&bucket)?.delete(&key).await
        }

        async fn exists(&mut self, bucket: Resource<Bucket>, key: String) -> Result<bool, StoreError> {
            self.store(&bucket)?.exists(&key).await
        }

        async fn list_keys(
            &mut self,
            bucket: Resource<Bucket>,
            cursor: Option<u64>,
        ) -> Result<store::KeyResponse, StoreError> {
            let opened = self.table.get(&bucket)?;
            let mark = |cursor: u64| usize::try_from(cursor).ok().and_then(|at| opened.marks.get(at));
            let after = cursor.map(|cursor| mark(cursor).cloned().ok_or(StoreError::Cursor)).transpose()?;
            let store = opened.store.clone();
            let (keys, more) = store.page(after.as_deref()).await?;
            let bucket = self.table.get_mut(&bucket)?;
            let mut next = None;
            if let (true, Some(last)) = (more, keys.last()) {
                if bucket.marks.len() == MARKS_MAX {
                    return Err(StoreError::TooMany(MARKS_MAX * super::super::stores::PAGE_KEYS));
                }
                next = Some(bucket.marks.len() as u64);
                bucket.marks.push(last.clone());
            }
            Ok(store::KeyResponse { keys, cursor: next })
        }

        async fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
            self.table.delete(bucket)?;
            Ok(())
        }
    }

    impl atomics::Host for State {
        async fn increment(&mut self, bucket: Resource<Bucket>, key: String, delta: u64) -> Result<u64, StoreError> {
            // The draft counts without sign, the store with one.
            let delta = i64::try_from(delta).map_err(|_| StoreError::Delta)?;
            let sum = self.store(&bucket)?.increment(&key, delta).await?;
            u64::try_from(sum).map_err(|_| StoreError::Delta)
        }
    }

    impl batch::Host for State {
        async fn get_many(
            &mut self,
            bucket: Resource<Bucket>,
            keys: Vec<String>,
        ) -> Result<Vec<Option<(String, Vec<u8>)>>, StoreError> {
            let values = self.store(&bucket)?.get_many(&keys).await?;
            Ok(keys.into_iter().zip(values).map(|(key, value)| Some((key, value?))).collect())
        }

        async fn set_many(
            &mut self,
            bucket: Resource<Bucket>,
            pairs: Vec<(String, Vec<u8>)>,
        ) -> Result<(), StoreError> {
            self.store(&bucket)?.set_many(pairs).await
        }

        async fn delete_many(&mut self, bucket: Resource<Bucket>, keys: Vec<String>) -> Result<(), StoreError> {
            self.store(&bucket)?.delete_many(keys).await
        }
    }
}

mod draft2 {
    use wasmtime::component::{HasSelf, Linker, Resource};

    use super::{Bucket, Cas, State, StoreError};

    mod bindings {
        wasmtime::component::bindgen!({
            path: "wit/wasi-keyvalue-draft2.wit",
            imports: { default: async | trappable },
            with: {
                "wasi:keyvalue/store.bucket": crate::host::keyvalue::Bucket,
                "wasi:keyvalue/atomics.cas": crate::host::keyvalue::Cas,
            },
            trappable_error_type: { "wasi:keyvalue/store.error" => crate::host::stores::StoreError },
        });
    }
    pub(super) use bindings::wasi::keyvalue::{atomics, batch, store};

    pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
        bindings::Imports::add_to_linker::<_, HasSelf<State>>(linker, |state| state)
    }

    impl store::Host for State {
        async fn open(&mut self, identifier: String) -> Result<Resource<Bucket>, StoreError> {
            self.open_bucket(&identifier)
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
        async fn get(&mut self, bucket: Resource<Bucket>, key: String) -> Result<Option<Vec<u8>>, StoreError> {
            self.store(&bucket)?.get(&key).await
        }

        async fn set(&mut self, bucket: Resource<Bucket>, key: String, value: Vec<u8>) -> Result<(), StoreError> {
            self.store(&bucket)?.set(&key, value).await
        }

        async fn delete(&mut self, bucket: Resource<Bucket>, key: String) -> Result<(), StoreError> {
            self.store(&bucket)?.delete(&key).await
        }

        async fn exists(&mut self, bucket: Resource<Bucket>, key: String) -> Result<bool, StoreError> {
            self.store(&bucket)?.exists(&key).await
        }

        async fn list_keys(
            &mut self,
            bucket: Resource<Bucket>,
            cursor: Option<String>,
        ) -> Result<store::KeyResponse, StoreError> {
            let (keys, more) = self.store(&bucket)?.page(cursor.as_deref()).await?;
            let cursor = if more { keys.last().cloned() } else { None };
            Ok(store::KeyResponse { keys, cursor })
        }

        async fn drop(&mut self, bucket: Resource<Bucket>) -> wasmtime::Result<()> {
            self.table.delete(bucket)?;
            Ok(())
        }
    }

    impl atomics::Host for State {
        async fn increment(&mut self, bucket: Resource<Bucket>, key: String, delta: i64) -> Result<i64, StoreError> {
            self.store(&bucket)?.increment(&key, delta).await
        }

        /// Compares at the store's home, where all writes are made one after another: a lock between nodes. Of a store
        /// without a home it compares with what this node knows, and nothing comes between that and the write; but the
        /// last write wins, so a write elsewhere that has not arrived yet is not seen: no lock between nodes. In a backend it
        /// compares there, for all nodes.
        async fn swap(
            &mut self,
            cas: Resource<Cas>,
            value: Vec<u8>,
        ) -> wasmtime::Result<Result<(), atomics::CasError>> {
            let Cas { store, key, seen } = self.table.delete(cas)?;
            let swapped = store.swap(&key, seen.as_deref(), value).await;
            match swapped {
                Ok(true) => Ok(Ok(())),
                Ok(false) => match Cas::look(store, key).await {
                    Ok(cas) => Ok(Err(atomics::CasError::CasFailed(self.table.push(cas)?))),
                    Err(error) => Ok(Err(atomics::CasError::StoreError(store::Host::convert_error(self, error)?))),
                },
                Err(error) => Ok(Err(atomics::CasError::StoreError(store::Host::convert_error(self, error)?))),
            }
        }
    }

    impl atomics::HostCas for State {
        async fn new(&mut self, bucket: Resource<Bucket>, key: String) -> Result<Resource<Cas>, StoreError> {
            let cas = Cas::look(self.store(&bucket)?, key).await?;
            Ok(self.table.push(cas)?)
        }

        async fn current(&mut self, cas: Resource<Cas>) -> Result<Option<Vec<u8>>, StoreError> {
            Ok(self.table.get(&cas)?.seen.clone())
        }

        async fn drop(&mut self, cas: Resource<Cas>) -> wasmtime::Result<()> {
            self.table.delete(cas)?;
            Ok(())
        }
    }

    impl batch::Host for State {
        async fn get_many(
            &mut self,
            bucket: Resource<Bucket>,
            keys: Vec<String>,
        ) -> Result<Vec<(String, Option<Vec<u8>>)>, StoreError> {
            let values = self.store(&bucket)?.get_many(&keys).await?;
            Ok(keys.into_iter().zip(values).collect())
        }

        async fn set_many(
            &mut self,
            bucket: Resource<Bucket>,
            pairs: Vec<(String, Vec<u8>)>,
        ) -> Result<(), StoreError> {
            self.store(&bucket)?.set_many(pairs).await
        }

        async fn delete_many(&mut self, bucket: Resource<Bucket>, keys: Vec<String>) -> Result<(), StoreError> {
            self.store(&bucket)?.delete_many(keys).await
        }
    }
}

#[cfg(test)]
mod tests;
