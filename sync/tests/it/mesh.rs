//! Writes between nodes.

use bytes::Bytes;

use crate::fleet::{Fleet, store, until};

#[tokio::test]
async fn a_write_on_one_node_is_read_on_the_others_and_so_is_its_deletion() {
    let fleet = Fleet::meshed(&["a", "b", "c"]).await;
    fleet.set(0, "k", "1").await;
    fleet.sees(1, "k", Some("1")).await;
    fleet.sees(2, "k", Some("1")).await;
    fleet.set(2, "k", "2").await;
    fleet.sees(0, "k", Some("2")).await;
    fleet.kv(1).delete(&store(), "k").await.unwrap();
    fleet.sees(0, "k", None).await;
    fleet.sees(2, "k", None).await;
    assert!(!fleet.kv(2).exists(&store(), "k").unwrap());
    fleet.close().await;
}

#[tokio::test]
async fn values_of_the_largest_size_pass_and_are_acknowledged() {
    let fleet = Fleet::meshed(&["a", "b"]).await;
    let value = Bytes::from(vec![7; selvage_sync::entry::VALUE_BYTES_MAX]);
    for number in 0..12 {
        fleet.kv(0).set(&store(), &format!("k{number}"), value.clone()).await.unwrap();
    }
    until("all arrived", || fleet.kv(1).list(&store(), "", None, 100).unwrap().len() == 12).await;
    until("all acknowledged", || fleet.kv(0).status()[0].lag == Some(0)).await;
    fleet.close().await;
}

#[tokio::test]
async fn what_was_written_on_both_sides_of_a_partition_is_on_both_after_it() {
    let fleet = Fleet::meshed(&["a", "b"]).await;
    fleet.set(0, "both", "before").await;
    fleet.set(0, "gone", "before").await;
    fleet.sees(1, "gone", Some("before")).await;

    fleet.kv(0).partition(true);
    until("the links end", || !fleet.kv(0).status()[0].connected && !fleet.kv(1).status()[0].connected).await;
    fleet.set(0, "a", "1").await;
    fleet.set(0, "both", "older").await;
    fleet.set(1, "b", "1").await;
    fleet.set(1, "both", "newer").await;
    fleet.kv(1).delete(&store(), "gone").await.unwrap();
    assert_eq!(fleet.kv(1).get(&store(), "a").unwrap(), None);
    assert_eq!(fleet.kv(0).get(&store(), "b").unwrap(), None);

    fleet.kv(0).partition(false);
    fleet.sees(1, "a", Some("1")).await;
    fleet.sees(0, "b", Some("1")).await;
    fleet.sees(0, "both", Some("newer")).await;
    fleet.sees(1, "both", Some("newer")).await;
    fleet.sees(0, "gone", None).await;
    fleet.close().await;
}

#[tokio::test]
async fn increments_on_two_nodes_at_once_all_count() {
    let fleet = Fleet::meshed(&["a", "b"]).await;
    let (store, one, other) = (store(), fleet.kv(0).clone(), fleet.kv(1).clone());
    fleet.kv(1).partition(true);
    for _ in 0..20 {
        let (one, other) = tokio::join!(one.increment(&store, "n", 1), other.increment(&store, "n", 2));
        one.unwrap();
        other.unwrap();
    }
    fleet.kv(1).partition(false);
    let sum = Some(Bytes::copy_from_slice(&60_i64.to_le_bytes()));
    until("both see the sum", || [&one, &other].iter().all(|kv| kv.get(&store, "n").unwrap() == sum)).await;
    assert_eq!(one.increment(&store, "n", -10).await.unwrap(), 50);
    drop((one, other));
    fleet.close().await;
}

#[tokio::test]
async fn a_node_gets_from_a_third_what_its_writer_could_not_tell_it() {
    let fleet = Fleet::start(&["a", "b", "c"]).await;
    // No link between a and c, ever: b stands between them.
    fleet.kv(0).set_peers(vec![fleet.address(1)]);
    fleet.kv(1).set_peers(vec![fleet.address(0), fleet.address(2)]);
    fleet.kv(2).set_peers(vec![fleet.address(1)]);
    fleet.linked().await;
    fleet.set(0, "k", "1").await;
    fleet.sees(2, "k", Some("1")).await;
    fleet.set(2, "k", "2").await;
    fleet.sees(0, "k", Some("2")).await;
    fleet.close().await;
}

#[tokio::test]
async fn a_node_that_comes_late_gets_all_even_from_a_node_that_did_not_write_it() {
    let mut fleet = Fleet::meshed(&["a", "b"]).await;
    for number in 0..300 {
        fleet.set(0, &format!("k{number:03}"), "v").await;
    }
    fleet.sees(1, "k299", Some("v")).await;
    // The writer is cut off; c begins from nothing and has only b.
    fleet.kv(0).partition(true);
    let empty = tempfile::tempdir().unwrap();
    let tls = fleet.tls("c");
    let kv = crate::fleet::open("c", empty.path(), tls).await;
    fleet.nodes.push(("c".parse().unwrap(), kv, empty));
    fleet.introduce();
    until("all keys are there", || fleet.kv(2).list(&store(), "k", None, 1000).unwrap().len() == 300).await;
    fleet.close().await;
}

#[tokio::test]
async fn a_restart_from_disk_keeps_the_data_and_the_links_come_back() {
    let mut fleet = Fleet::meshed(&["a", "b"]).await;
    fleet.set(0, "k", "1").await;
    assert_eq!(fleet.kv(0).increment(&store(), "n", 5).await.unwrap(), 5);
    fleet.sees(1, "k", Some("1")).await;
    fleet.restart(0).await;
    fleet.sees(0, "k", Some("1")).await;
    assert_eq!(fleet.kv(0).increment(&store(), "n", 5).await.unwrap(), 10);
    fleet.set(1, "k", "2").await;
    fleet.introduce();
    fleet.sees(0, "k", Some("2")).await;
    fleet.set(0, "k", "3").await;
    fleet.sees(1, "k", Some("3")).await;
    fleet.close().await;
}
