//! Lists: NATS has no order of keys and finds them by whole tokens, so the server tells all keys of the store, without
//! values, and the first of those that are asked for are kept. It costs the server a look at each key of the store.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::Message;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use futures_util::StreamExt as _;
use selvage_config::StoreName;
use selvage_sync::Listed;

use super::key::Subjects;
use super::wire::Connection;
use super::{Nats, life, lost_or_refused, refused};
use crate::error::{Failure, StoreError, Trouble};

/// How long a list may take, however many keys the store has.
const LIST_MAX: Duration = Duration::from_secs(10);
/// Keys that are asked for at once.
const BATCH: usize = 1_000;
/// How long the server keeps what a list left behind that was broken off.
const FORGOTTEN: Duration = Duration::from_secs(30);
/// How long a value is, where the server does not send it.
const SIZE: &str = "Nats-Msg-Size";

/// Which keys, and those that were found: never more than `limit`.
struct Wanted<'a> {
    subjects: &'a Subjects,
    prefix: &'a str,
    after: Option<&'a str>,
    limit: usize,
    found: BTreeMap<String, Listed>,
}

impl Nats {
    pub(crate) async fn list(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let subjects = self.subjects(store);
        let mut wanted = Wanted { subjects: &subjects, prefix, after, limit, found: BTreeMap::new() };
        self.contact
            .ask_for(LIST_MAX, async |connection| {
                let _turn = self.lists.acquire().await.map_err(|_| Trouble::Away)?;
                let consumer = consumer(&connection, subjects.of_all()).await?;
                let looked = look(&connection, &consumer, &mut wanted).await;
                // The server forgets it by itself, too.
                let _ = connection.stream.delete_consumer(&consumer.cached_info().name).await;
                looked?;
                Ok(wanted.found.into_values().collect())
            })
            .await
    }
}

async fn consumer(connection: &Connection, filter_subject: String) -> Result<PullConsumer, Failure> {
    let config = pull::Config {
        deliver_policy: DeliverPolicy::LastPerSubject,
        ack_policy: AckPolicy::None,
        filter_subject,
        headers_only: true,
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: FORGOTTEN,
        ..pull::Config::default()
    };
    connection.stream.create_consumer(config).await.map_err(|error| lost_or_refused(connection, &error))
}

async fn look(connection: &Connection, consumer: &PullConsumer, wanted: &mut Wanted<'_>) -> Result<(), Failure> {
    let mut pending = consumer.cached_info().num_pending;
    while pending > 0 {
        let batch = consumer.fetch().max_messages(BATCH).messages().await;
        let mut batch = batch.map_err(|error| lost_or_refused(connection, &error))?;
        let mut is_empty = true;
        while let Some(message) = batch.next().await {
            let message = message.map_err(|error| match error.downcast_ref() {
                Some(error) => refused(error),
                None => Trouble::Lost.into(),
            })?;
            is_empty = false;
            pending = message.info().map_err(|_| Trouble::Foreign)?.pending;
            wanted.take(&message);
        }
        if is_empty {
            // What was there is gone since.
            return Ok(());
        }
    }
    Ok(())
}

impl Wanted<'_> {
    /// Notes a key that is asked for. What is no entry of ours is passed over: nothing could be done with its name.
    fn take(&mut self, message: &Message) {
        let Some(key) = self.subjects.key(&message.subject) else { return };
        let empty = async_nats::HeaderMap::new();
        let headers = message.headers.as_ref().unwrap_or(&empty);
        let is_wanted = key.starts_with(self.prefix) && self.after.is_none_or(|after| key.as_str() > after);
        if !is_wanted || matches!(life(headers), Ok(None)) {
            return;
        }
        let bytes = headers.get(SIZE).and_then(|size| size.as_str().parse().ok()).unwrap_or_default();
        let published = message.info().map(|info| info.published.unix_timestamp_nanos() / 1_000_000);
        let stamp_ms = published.ok().and_then(|ms| u64::try_from(ms).ok()).unwrap_or_default();
        self.found.insert(key.clone(), Listed { name: key, bytes, stamp_ms, node: None });
        if self.found.len() > self.limit {
            self.found.pop_last();
        }
    }
}
