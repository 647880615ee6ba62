//! Homes of stores: from the configuration into plans.

use selvage_config::plan::{Former, Home, News, Plan, Told};

use crate::world::World;

async fn world(stores: &str) -> World {
    let mut world = World::start_with(|config, directory| {
        if let Ok(text) = std::fs::read_to_string(directory.join("stores.toml")) {
            config.stores = toml::from_str(&text).unwrap();
        }
    })
    .await;
    say(&mut world, stores).await;
    world
}

/// Another configuration, and a restart.
pub(crate) async fn say(world: &mut World, stores: &str) {
    std::fs::write(world.directory.path().join("stores.toml"), stores).unwrap();
    world.restart().await;
}

pub(crate) async fn plan(world: &World) -> Plan {
    world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap()
}

#[tokio::test]
async fn plans_name_the_homes_of_the_file_and_a_move_with_who_was_the_home_before() {
    let mut world = world("['shop/orders']\nhome = 'fra-1'").await;
    let first = plan(&world).await;
    let home = first.homes[0].clone();
    assert_eq!(home, Home::first("shop/orders".parse().unwrap(), "fra-1".parse().unwrap(), home.term));
    assert!(first.generation >= 1 && home.term > 0);
    world.restart().await;
    assert_eq!(plan(&world).await.homes, first.homes, "a start with the same file changes nothing");

    say(&mut world, "['shop/orders']\nhome = 'sin-1'").await;
    let second = plan(&world).await;
    let moved = second.homes[0].clone();
    assert!(second.generation > first.generation && moved.term > home.term);
    assert_eq!((moved.node.as_str(), &moved.former[..]), ("sin-1", &[Former { node: home.node, term: home.term }][..]));

    say(&mut world, "").await;
    assert_eq!(plan(&world).await.homes, second.homes, "it keeps its home");
    say(&mut world, &format!("['shop/orders']\nhome = 'iad-1'\nlost = {}", moved.term)).await;
    let third = plan(&world).await.homes[0].clone();
    assert_eq!((third.node.as_str(), third.lost, third.former.len()), ("iad-1", moved.term, 0));
    world.stop().await;
}

#[tokio::test]
async fn a_node_that_waits_for_what_changed_is_told_of_homes_among_it() {
    let mut world = world("").await;
    let none = plan(&world).await;
    assert_eq!(none.homes, []);
    say(&mut world, "['shop/orders']\nhome = 'fra-1'").await;
    let path = format!("/api/v1/plans/fra-1?after={}&nonce=other", none.generation);
    let news: News = world.node("fra-1").get(&path).await.json().await.unwrap();
    let Told::Whole(whole) = news.plan else { panic!("another run knows nothing of the plan before") };
    assert_eq!(whole.homes.len(), 1);
    world.stop().await;
}
