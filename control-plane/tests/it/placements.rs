//! Placements of stores: from the configuration into plans.

use selvage_config::control_plane::ControlPlaneConfig;
use selvage_config::plan::{News, Told};

use crate::homes::{plan, say};
use crate::world::World;

/// A control plane whose file says this of stores and placements.
async fn world(stores: &str) -> World {
    let mut world = World::start_with(|config, directory| {
        if let Ok(text) = std::fs::read_to_string(directory.join("stores.toml")) {
            let whole = "listen='127.0.0.1:0'\nstate_dir='s'\nidentity={certificate='c',key='k',roots='r'}\n";
            let read = ControlPlaneConfig::parse(&directory.join("cp.toml"), &format!("{whole}{text}")).unwrap();
            (config.stores, config.placements) = (read.stores, read.placements);
        }
    })
    .await;
    say(&mut world, stores).await;
    world
}

#[tokio::test]
async fn plans_name_the_placements_of_the_file_and_a_store_stays_where_it_was_placed() {
    let orders = "[stores.'shop/orders']\nplacement='eu'\ncache_ms=500\n";
    let mut world = world(&format!("[placements.eu]\nregions=['fra','ams']\n{orders}")).await;
    let first = plan(&world).await;
    let eu = &first.placements[0];
    assert_eq!((eu.name.as_str(), eu.regions.len(), eu.stores[&"shop/orders".parse().unwrap()]), ("eu", 2, 500));
    world.restart().await;
    assert_eq!(plan(&world).await.generation, first.generation, "a start with the same file changes nothing");

    say(&mut world, &format!("[placements.eu]\nregions=['ams','sin','iad']\n{orders}")).await;
    let second = plan(&world).await;
    assert!(second.generation > first.generation);
    assert_eq!(second.placements[0].regions.len(), 3);
    say(&mut world, "").await;
    assert_eq!(plan(&world).await.placements, second.placements, "it stays");

    let path = format!("/api/v1/plans/fra-1?after={}&nonce=other", first.generation);
    let news: News = world.node("fra-1").get(&path).await.json().await.unwrap();
    let Told::Whole(whole) = news.plan else { panic!("another run knows nothing of the plan before") };
    assert_eq!(whole.placements, second.placements);
    world.stop().await;
}
