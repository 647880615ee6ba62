//! Both drafts, as their guests would call them.

use futures_util::future::try_join_all;

use super::super::stores::{BATCH_KEYS_MAX, PAGE_KEYS};
use super::*;
use crate::host::tests::state;

fn again<T: 'static>(handle: &Resource<T>) -> Resource<T> {
    Resource::new_borrow(handle.rep())
}

/// A bucket with `keys` keys, `0000` and on.
async fn bucket(state: &mut State, keys: usize) -> Resource<Bucket> {
    let bucket = draft2::store::Host::open(state, "default".into()).await.unwrap();
    let store = state.store(&bucket).unwrap();
    let names: Vec<String> = (0..keys).map(|key| format!("{key:04}")).collect();
    try_join_all(names.iter().map(|name| store.set(name, vec![1]))).await.unwrap();
    bucket
}

#[tokio::test]
async fn only_a_granted_label_opens() {
    let (mut state, _dir) = state(&["default"]).await;
    assert!(draft::store::Host::open(&mut state, "default".into()).await.is_ok());
    let denied = draft::store::Host::open(&mut state, "other".into()).await.unwrap_err();
    let told = draft::store::Host::convert_error(&mut state, denied).unwrap();
    assert!(matches!(told, draft::store::Error::AccessDenied));
    let unknown = draft2::store::Host::open(&mut state, "test/default".into()).await.unwrap_err();
    let told = draft2::store::Host::convert_error(&mut state, unknown).unwrap();
    assert!(matches!(told, draft2::store::Error::NoSuchStore));
}

#[tokio::test]
async fn a_list_goes_on_where_its_cursor_points() {
    let (mut state, _dir) = state(&["default"]).await;
    let bucket = bucket(&mut state, PAGE_KEYS + 5).await;
    let first = draft2::store::HostBucket::list_keys(&mut state, again(&bucket), None).await.unwrap();
    assert_eq!(first.keys.len(), PAGE_KEYS);
    let rest = draft2::store::HostBucket::list_keys(&mut state, again(&bucket), first.cursor).await.unwrap();
    assert_eq!((rest.keys.len(), rest.cursor), (5, None));
    assert_eq!(rest.keys[4], format!("{:04}", PAGE_KEYS + 4));
    // The first draft counts its cursors.
    let first = draft::store::HostBucket::list_keys(&mut state, again(&bucket), None).await.unwrap();
    assert_eq!((first.keys.len(), first.cursor), (PAGE_KEYS, Some(0)));
    let rest = draft::store::HostBucket::list_keys(&mut state, again(&bucket), Some(0)).await.unwrap();
    assert_eq!((rest.keys.len(), rest.cursor), (5, None));
    let unknown = draft::store::HostBucket::list_keys(&mut state, again(&bucket), Some(7)).await;
    assert!(matches!(unknown, Err(StoreError::Cursor)));
}

#[tokio::test]
async fn counts_are_the_same_in_both_drafts() {
    let (mut state, _dir) = state(&["default"]).await;
    let bucket = bucket(&mut state, 0).await;
    assert_eq!(draft::atomics::Host::increment(&mut state, again(&bucket), "n".into(), 5).await.unwrap(), 5);
    assert_eq!(draft2::atomics::Host::increment(&mut state, again(&bucket), "n".into(), -7).await.unwrap(), -2);
    // What the unsigned draft can't say it does not say wrongly.
    let below = draft::atomics::Host::increment(&mut state, again(&bucket), "n".into(), 0).await;
    assert!(matches!(below, Err(StoreError::Delta)));
    let beyond = draft::atomics::Host::increment(&mut state, again(&bucket), "n".into(), u64::MAX).await;
    assert!(matches!(beyond, Err(StoreError::Delta)));
}

#[tokio::test]
async fn a_swap_needs_the_value_that_was_seen() {
    let (mut state, _dir) = state(&["default"]).await;
    let bucket = bucket(&mut state, 0).await;
    let first = draft2::atomics::HostCas::new(&mut state, again(&bucket), "k".into()).await.unwrap();
    let late = draft2::atomics::HostCas::new(&mut state, again(&bucket), "k".into()).await.unwrap();
    assert_eq!(draft2::atomics::HostCas::current(&mut state, again(&first)).await.unwrap(), None);
    assert!(draft2::atomics::Host::swap(&mut state, first, b"1".to_vec()).await.unwrap().is_ok());
    let refused = draft2::atomics::Host::swap(&mut state, late, b"2".to_vec()).await.unwrap();
    let Err(draft2::atomics::CasError::CasFailed(next)) = refused else { panic!("it saw nothing of the first") };
    let seen = draft2::atomics::HostCas::current(&mut state, again(&next)).await.unwrap();
    assert_eq!(seen, Some(b"1".to_vec()));
    assert!(draft2::atomics::Host::swap(&mut state, next, b"2".to_vec()).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_batch_is_bounded() {
    let (mut state, _dir) = state(&["default"]).await;
    let bucket = bucket(&mut state, 2).await;
    let keys = vec!["0000".to_owned(), "none".to_owned()];
    let got = draft2::batch::Host::get_many(&mut state, again(&bucket), keys.clone()).await.unwrap();
    assert_eq!(got, [("0000".to_owned(), Some(vec![1])), ("none".to_owned(), None)]);
    let got = draft::batch::Host::get_many(&mut state, again(&bucket), keys.clone()).await.unwrap();
    assert_eq!(got, [Some(("0000".to_owned(), vec![1])), None]);
    draft::batch::Host::set_many(&mut state, again(&bucket), vec![("none".into(), vec![2])]).await.unwrap();
    draft2::batch::Host::delete_many(&mut state, again(&bucket), vec!["0000".into()]).await.unwrap();
    let got = draft2::batch::Host::get_many(&mut state, again(&bucket), keys).await.unwrap();
    assert_eq!(got, [("0000".to_owned(), None), ("none".to_owned(), Some(vec![2]))]);
    let many = vec![String::from("k"); BATCH_KEYS_MAX + 1];
    let refused = draft2::batch::Host::delete_many(&mut state, again(&bucket), many).await;
    assert!(matches!(refused, Err(StoreError::TooMany(_))));
}
