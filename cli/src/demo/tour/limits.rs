//! Hostile guests beside a healthy one.

use miette::Report;

use super::{Tour, expect};
use crate::demo::apps;
use crate::demo::visit::Visit;

/// Hostile requests at once.
const AT_ONCE: usize = 8;

/// A guest in an endless loop is ended by its CPU limit.
pub(super) async fn burn(tour: &mut Tour<'_>) -> Result<String, Report> {
    hostile(tour, "burn", "exceeded-cpu").await
}

/// A guest that takes memory is ended by its memory limit.
pub(super) async fn hog(tour: &mut Tour<'_>) -> Result<String, Report> {
    hostile(tour, "hog", "exceeded-memory").await
}

async fn hostile(tour: &mut Tour<'_>, name: &str, outcome: &str) -> Result<String, Report> {
    let directory = apps::hostile(tour.fleet, name)?;
    let released = apps::deploy(tour.fleet, &directory, tour.output).await?;
    apps::served(tour.fleet, &released).await?;
    let front = tour.fleet.node("fra")?.front();
    let attack = Visit::get(name, "/");
    let attacks = futures_util::future::join_all((0..AT_ONCE).map(|_| tour.visitor.visit(front, &attack)));
    let neighbour = async {
        for _ in 0..AT_ONCE {
            let answer = tour.visitor.visit(front, &Visit::get("hello", "/")).await?;
            expect(answer.status == 200, || format!("the neighbour answered {}", answer.status))?;
        }
        Ok::<_, Report>(())
    };
    let (attacks, neighbour) = tokio::join!(attacks, neighbour);
    neighbour?;
    for answer in attacks {
        let answer = answer?;
        expect(answer.status == 500 && answer.outcome.as_deref() == Some(outcome), || {
            format!("{name} was answered {} {:?}", answer.status, answer.outcome)
        })?;
    }
    Ok(format!("{AT_ONCE} times {outcome}; {AT_ONCE} neighbouring requests answered meanwhile"))
}
