//! Releases that must not run, a rollout under load, and a fleet without its control plane.

use std::fs;
use std::time::{Duration, Instant};

use miette::Report;
use selvage_config::Digest;
use selvage_config::bundle::Bundle;
use selvage_control_plane::answers::{Released, RolloutState};

use super::load::options;
use super::{Tour, expect};
use crate::demo::apps;
use crate::demo::visit::{Version, Visit};
use crate::deploy::{publish, release, roll_back, rollout_until};
use crate::loadtest::load_failure;
use crate::output::failure;
use crate::push::push;
use crate::registry::Reference;

/// How long nodes may take to refuse.
const VERDICT: Duration = Duration::from_secs(60);

/// The example `hello` with another greeting: a release that differs in its manifest.
fn hello_saying(tour: &Tour<'_>, greeting: &str) -> Result<Bundle, Report> {
    let mut bundle = Bundle::load(&tour.fleet.apps().join("hello"))?;
    if let Some(variable) = bundle.app.variables.get_mut("greeting") {
        variable.default = Some(greeting.to_owned());
    }
    Ok(bundle)
}

/// Waits until every node has refused the release; they must name `cause`, and go on serving the old one.
async fn refused(tour: &Tour<'_>, released: &Released, causes: &[&str]) -> Result<String, Report> {
    let nodes = tour.fleet.nodes().count();
    let until = Instant::now() + VERDICT;
    let rollout = rollout_until(tour.fleet.client(), released, until, |r| r.refused == nodes || r.serving > 0).await?;
    expect(rollout.refused == nodes && rollout.serving == 0, || {
        format!("{} of {nodes} nodes refused it, {} serve it", rollout.refused, rollout.serving)
    })?;
    let mut told = String::new();
    for node in &rollout.nodes {
        if let RolloutState::Refused { cause, reason } = &node.state {
            expect(causes.contains(&cause.as_str()), || format!("{} refused it for {cause}: {reason}", node.node))?;
            told = format!("{cause}: {reason}");
        }
    }
    for node in tour.fleet.nodes() {
        let answer = tour.visitor.visit(node.front(), &Visit::get("hello", "/")).await?;
        expect(answer.status == 200, || format!("{} does not serve the old release: {}", node.name, answer.status))?;
    }
    Ok(told)
}

/// Pushed but not signed.
pub(super) async fn unsigned(tour: &mut Tour<'_>) -> Result<String, Report> {
    let bundle = hello_saying(tour, "Unsigned")?;
    let pushed = push(tour.fleet.client(), &bundle, None, "unsigned", tour.output).await?;
    let reference = Reference { repository: pushed.repository, reference: pushed.manifest.to_string() };
    let released = release(tour.fleet.client(), &bundle.app.name, &reference, [].into()).await?;
    let told = refused(tour, &released, &["unsigned"]).await?;
    roll_back(tour.fleet.client(), &bundle.app.name, None).await?;
    Ok(told)
}

/// Signed, and then a byte of the component is changed where the registry keeps it.
pub(super) async fn tampered(tour: &mut Tour<'_>) -> Result<String, Report> {
    let mut bundle = hello_saying(tour, "Tampered")?;
    // A custom section at the end makes it another component: no node has its bytes yet.
    let (old, component) =
        bundle.blobs.pop_first().ok_or_else(|| crate::output::failed("the app has no component", None))?;
    let component = [component.as_ref(), b"\x00\x05\x04tour"].concat();
    let digest = Digest::of(&component);
    for part in bundle.app.components.values_mut().filter(|part| part.digest == old) {
        part.digest = digest;
    }
    bundle.blobs.insert(digest, component.into());
    let reference = publish(tour.fleet.client(), &bundle, tour.fleet.signing_key(), tour.output).await?;
    let path = tour.fleet.registry_blob(digest);
    let damage = || {
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes)
    };
    damage().map_err(|error| failure(&format!("damage {}", path.display()), &error, None))?;
    let released = release(tour.fleet.client(), &bundle.app.name, &reference, [].into()).await?;
    let told = refused(tour, &released, &["digest", "fetch"]).await?;
    roll_back(tour.fleet.client(), &bundle.app.name, None).await?;
    Ok(told)
}

/// A new release while requests come in over every version at every node.
pub(super) async fn rollout(tour: &mut Tour<'_>) -> Result<String, Report> {
    let bundle = hello_saying(tour, "Moin")?;
    let load = selvage_loadtest::run(options(tour, "/", 150, Duration::from_secs(5))?, |_| {});
    let deployed = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let reference = publish(tour.fleet.client(), &bundle, tour.fleet.signing_key(), tour.output).await?;
        let began = Instant::now();
        let released = release(tour.fleet.client(), &bundle.app.name, &reference, [].into()).await?;
        apps::served(tour.fleet, &released).await?;
        Ok::<_, Report>((released, began.elapsed()))
    };
    let (report, deployed) = tokio::join!(load, deployed);
    let (released, took) = deployed?;
    let report = report.map_err(|error| load_failure(&error))?;
    let total = &report.total;
    expect(report.answered(), || format!("requests failed during the rollout:\n{report}"))?;
    let greeted = tour.visitor.visit(tour.fleet.node("sin")?.front(), &Visit::get("hello", "/env")).await?;
    expect(greeted.body.contains("Moin"), || format!("the new release does not serve: {:?}", greeted.body))?;
    let id = &released.release.id;
    Ok(format!("{id} everywhere after {} ms; {} requests, 0 failed", took.as_millis(), total.requests))
}

/// Back to the release before.
pub(super) async fn rollback(tour: &mut Tour<'_>) -> Result<String, Report> {
    let app = "hello".parse().map_err(|e| failure("name the app", &e as &selvage_config::id::NameError, None))?;
    let began = Instant::now();
    let released = roll_back(tour.fleet.client(), &app, Some(1)).await?;
    apps::served(tour.fleet, &released).await?;
    let took = began.elapsed();
    let greeted = tour.visitor.visit(tour.fleet.node("iad")?.front(), &Visit::get("hello", "/env")).await?;
    expect(!greeted.body.contains("Moin"), || format!("the newer release still serves: {:?}", greeted.body))?;
    Ok(format!("{} everywhere after {} ms", released.release.id, took.as_millis()))
}

/// The control plane goes; nodes serve, and one comes back from its own disk.
pub(super) async fn alone(tour: &mut Tour<'_>) -> Result<String, Report> {
    tour.fleet.stop_control_plane().await;
    let began = Instant::now();
    tour.fleet.restart("iad").await?;
    let restarted = began.elapsed();
    let served = every_node_serves(tour).await;
    tour.fleet.start_control_plane().await?;
    served?;
    Ok(format!("iad drained and serving again from disk after {} ms", restarted.as_millis()))
}

async fn every_node_serves(tour: &Tour<'_>) -> Result<(), Report> {
    for node in tour.fleet.nodes() {
        for app in ["hello", "hello-p3"] {
            for version in Version::ALL {
                let visit = Visit { version, ..Visit::get(app, "/") };
                let answer = tour.visitor.visit(node.front(), &visit).await?;
                expect(answer.status == 200, || format!("{app} at {} over {version:?}: {}", node.name, answer.status))?;
            }
        }
    }
    Ok(())
}
