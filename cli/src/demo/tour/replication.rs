//! Writes that reach other regions, and a partition that heals.

use std::net::SocketAddr;

use miette::Report;
use reqwest::Method;
use serde_json::json;

use super::{Tour, eventually, expect};
use crate::client::send;
use crate::demo::visit::{Answer, Visit};

/// A key that only the tour uses.
const KEY: &str = "/kv/tour";

async fn write_at(tour: &Tour<'_>, front: SocketAddr, method: Method, path: &str, body: &str) -> Result<(), Report> {
    let visit = Visit { method: method.clone(), body, ..Visit::get("counter", path) };
    let answer = tour.visitor.visit(front, &visit).await?;
    expect((200..300).contains(&answer.status), || format!("{method} {path}: {} {:?}", answer.status, answer.body))
}

async fn read_at(tour: &Tour<'_>, front: SocketAddr, path: &str) -> Result<Answer, Report> {
    tour.visitor.visit(front, &Visit::get("counter", path)).await
}

/// A guest's write in one region is read by a guest in another; a delete too.
pub(super) async fn write(tour: &mut Tour<'_>) -> Result<String, Report> {
    let (fra, sin) = (tour.fleet.node("fra")?.front(), tour.fleet.node("sin")?.front());
    connected(tour).await?;
    write_at(tour, fra, Method::PUT, KEY, "blue").await?;
    let seen = eventually("the write", async || {
        let answer = read_at(tour, sin, KEY).await?;
        Ok(answer.status == 200 && answer.body == "blue")
    });
    let written = seen.await?;
    write_at(tour, fra, Method::DELETE, KEY, "").await?;
    let gone = eventually("the delete", async || Ok(read_at(tour, sin, KEY).await?.status == 404)).await?;
    Ok(format!("write seen after {} ms, delete after {} ms", written.as_millis(), gone.as_millis()))
}

/// Waits until every node has a link to both others.
async fn connected(tour: &Tour<'_>) -> Result<(), Report> {
    for node in tour.fleet.nodes() {
        let address = tour.fleet.client().admin_address(&node.name).await?;
        let linked = eventually("links between nodes", async || {
            let peers = send(tour.fleet.client().admin(Method::GET, address, "/peers"), "ask for the peers").await?;
            let peers: serde_json::Value = peers.json().await.unwrap_or_default();
            let peers = peers.as_array().cloned().unwrap_or_default();
            // Those of a placement are among fewer nodes.
            let of_all = peers.iter().filter(|peer| peer["placement"].is_null());
            Ok(of_all.filter(|peer| peer["connected"] == true).count() == 2)
        });
        linked.await?;
    }
    Ok(())
}

/// Both sides take writes while apart; afterwards both have both, and a delete has not come back.
pub(super) async fn partition(tour: &mut Tour<'_>) -> Result<String, Report> {
    let (fra, sin) = (tour.fleet.node("fra")?.front(), tour.fleet.node("sin")?);
    let name = sin.name.clone();
    let sin = sin.front();
    write_at(tour, fra, Method::PUT, "/kv/doomed", "x").await?;
    eventually("the write", async || Ok(read_at(tour, sin, "/kv/doomed").await?.status == 200)).await?;
    let admin = tour.fleet.client().admin_address(&name).await?;
    let isolate = async |on: bool| {
        let request = tour.fleet.client().admin(Method::POST, admin, "/peers/isolation").json(&json!({ "on": on }));
        send(request, "isolate a node").await.map(drop)
    };
    isolate(true).await?;
    write_at(tour, fra, Method::PUT, "/kv/west", "1").await?;
    write_at(tour, sin, Method::PUT, "/kv/east", "2").await?;
    write_at(tour, fra, Method::DELETE, "/kv/doomed", "").await?;
    let apart =
        read_at(tour, sin, "/kv/west").await?.status == 404 && read_at(tour, fra, "/kv/east").await?.status == 404;
    expect(apart, || "a write crossed the partition".into())?;
    isolate(false).await?;
    let healed = eventually("healing", async || {
        let west = read_at(tour, sin, "/kv/west").await?;
        let east = read_at(tour, fra, "/kv/east").await?;
        let doomed = read_at(tour, sin, "/kv/doomed").await?;
        Ok(west.body == "1" && east.body == "2" && doomed.status == 404)
    });
    Ok(format!("both sides wrote while apart; the same again {} ms after healing", healed.await?.as_millis()))
}
