//! Rollouts: what comes next, given what nodes tell. A function of the rollout, the nodes, their load and the time.
//!
//! A wave is given the release; once all of its nodes serve it and have done so for long enough, the next one follows.
//! What speaks against the release halts the rollout: a node that refuses it or falls silent with it, more errors or
//! traps than the old release has on requests of the same time, slower answers, or nodes that never come to serve. A
//! halted rollout takes the release back from every node: plans name the old one again.

use std::collections::{BTreeMap, BTreeSet};

use ring::digest::{SHA256, digest};
use selvage_config::plan::{AppStatus, ReleaseLoad};
use selvage_config::release::ReleaseId;
use selvage_config::rollout::{Gate, Selection};
use selvage_config::{NodeName, Region};

use crate::state::RolloutRecord;

/// A refusal with this cause may pass: the node tries again, and the wave waits for it.
const CAUSE_FETCH: &str = "fetch";
/// Slower answers count only from here on, microseconds: below it twice the time is noise.
const P99_FLOOR_US: u64 = 2_000;

/// A node as a rollout sees it.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) node: NodeName,
    pub(crate) region: Region,
    pub(crate) labels: BTreeMap<String, String>,
    /// Whether it tells its status.
    pub(crate) is_alive: bool,
    /// What became of the app there.
    pub(crate) app: Option<AppStatus>,
}

/// What releases answered since the rollout began, over all nodes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Compared {
    pub(crate) new: Option<ReleaseLoad>,
    pub(crate) old: Option<ReleaseLoad>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing yet.
    Wait,
    /// Give these nodes the release too.
    Take(BTreeSet<NodeName>),
    /// All nodes of the wave serve now: the bake begins.
    Bake,
    /// The next wave.
    Next,
    /// Every wave did well: the release is the current one.
    Done,
    /// Take it back.
    Halt(String),
}

/// What comes next. `nodes` are those that take part: cordoned and revoked ones do not.
pub(crate) fn next(
    rollout: &RolloutRecord,
    release: &ReleaseId,
    nodes: &[Seen],
    compared: &Compared,
    now_ms: u64,
) -> Step {
    let Some(wave) = rollout.waves.get(rollout.wave) else { return Step::Done };
    let wanted = wanted(&wave.nodes, rollout, release, nodes);
    if !wanted.is_empty() {
        return Step::Take(wanted);
    }
    let taken: Vec<&Seen> = nodes.iter().filter(|seen| rollout.taken.contains(&seen.node)).collect();
    if let Some(reason) = refused(&taken, release, rollout.gate.refusals_max) {
        return Step::Halt(reason);
    }
    if let Some(reason) = judge(&rollout.gate, compared) {
        return Step::Halt(reason);
    }
    let missing: Vec<&str> =
        taken.iter().filter(|seen| seen.is_alive && !serves(seen, release)).map(|seen| seen.node.as_str()).collect();
    let nobody = taken.is_empty() && matches!(wave.nodes, Selection::Percent(_)) && !nodes.is_empty();
    if !missing.is_empty() || nobody {
        let late_ms = now_ms.saturating_sub(rollout.since_ms);
        if late_ms <= rollout.gate.stall_ms {
            return Step::Wait;
        }
        let whom =
            if nobody { "no node is alive".to_owned() } else { format!("{} do not serve it", missing.join(", ")) };
        return Step::Halt(format!("after {late_ms} ms {whom}"));
    }
    match rollout.serving_ms {
        None => Step::Bake,
        Some(since_ms) if now_ms.saturating_sub(since_ms) < wave.bake_ms => Step::Wait,
        Some(_) if rollout.wave + 1 < rollout.waves.len() => Step::Next,
        Some(_) => Step::Done,
    }
}

/// The nodes that the wave lacks.
fn wanted(selection: &Selection, rollout: &RolloutRecord, release: &ReleaseId, nodes: &[Seen]) -> BTreeSet<NodeName> {
    let is_new = |seen: &&Seen| seen.is_alive && !rollout.taken.contains(&seen.node);
    let free = nodes.iter().filter(is_new);
    match selection {
        Selection::Region(region) => free.filter(|seen| seen.region == *region).map(|seen| seen.node.clone()).collect(),
        Selection::Label { name, value } => {
            free.filter(|seen| seen.labels.get(name) == Some(value)).map(|seen| seen.node.clone()).collect()
        }
        Selection::Percent(percent) => {
            let alive = nodes.iter().filter(|seen| seen.is_alive).count();
            let taken = nodes.iter().filter(|seen| seen.is_alive && rollout.taken.contains(&seen.node)).count();
            let share = (alive * usize::from(*percent)).div_ceil(100);
            let mut ranked: Vec<&Seen> = free.collect();
            // Another release begins with other nodes.
            ranked.sort_by_key(|seen| {
                digest(&SHA256, format!("{release}/{}", seen.node).as_bytes()).as_ref().first_chunk::<8>().copied()
            });
            ranked.into_iter().take(share.saturating_sub(taken)).map(|seen| seen.node.clone()).collect()
        }
    }
}

fn serves(seen: &Seen, release: &ReleaseId) -> bool {
    seen.app.as_ref().and_then(|app| app.serving.as_ref()).is_some_and(|serving| serving.release == *release)
}

/// Why too many nodes of the waves so far speak against the release, if they do.
fn refused(taken: &[&Seen], release: &ReleaseId, refusals_max: u32) -> Option<String> {
    let reasons: Vec<String> = taken
        .iter()
        .filter_map(|seen| {
            if !seen.is_alive {
                return Some(format!("{} fell silent with it", seen.node));
            }
            let refusal = seen.app.as_ref()?.refused.as_ref()?;
            let counts = refusal.release == *release && refusal.cause != CAUSE_FETCH;
            counts.then(|| format!("{} refused it ({}): {}", seen.node, refusal.cause, refusal.reason))
        })
        .collect();
    (reasons.len() > refusals_max as usize).then(|| reasons.join("; "))
}

/// Why the new release does worse than the old one, if it does.
fn judge(gate: &Gate, compared: &Compared) -> Option<String> {
    let new = compared.new.as_ref().filter(|new| new.requests >= gate.requests_min.max(1))?;
    let none = ReleaseLoad::none(new.release.clone());
    let old = compared.old.as_ref().unwrap_or(&none);
    let permille = |count: u64, of: u64| count.saturating_mul(1_000) / of.max(1);
    for (what, counted, before, more) in [
        ("requests fail", new.errors, old.errors, gate.errors_permille_more),
        ("requests end in a trap", new.traps, old.traps, gate.traps_permille_more),
    ] {
        let (now, then) = (permille(counted, new.requests), permille(before, old.requests));
        if counted > 0 && now > then.saturating_add(u64::from(more)) {
            return Some(format!(
                "{counted} of {} {what} ({now} of a thousand), with the old release {then} of a thousand",
                new.requests
            ));
        }
    }
    // With few requests of the old release its slowest one says nothing.
    let (now, then) = (new.p99_us()?, old.p99_us().filter(|_| old.requests >= gate.requests_min.max(1))?);
    let most = (then.saturating_mul(u64::from(gate.p99_percent_max)) / 100).max(P99_FLOOR_US);
    (now > most).then(|| format!("99 of 100 requests take up to {now} us, with the old release up to {then} us"))
}

#[cfg(test)]
mod tests {
    use selvage_config::Digest;
    use selvage_config::plan::{Refusal, Serving};
    use selvage_config::rollout::Wave;

    use super::*;
    use crate::state::Stage;

    fn release() -> ReleaseId {
        "hello@2".parse().unwrap()
    }

    fn rollout(waves: &[&str]) -> RolloutRecord {
        RolloutRecord {
            to: 2,
            waves: waves.iter().map(|text| text.parse::<Wave>().unwrap()).collect(),
            gate: Gate::default(),
            wave: 0,
            since_ms: 0,
            serving_ms: None,
            taken: BTreeSet::new(),
            state: Stage::Running,
        }
    }

    fn seen(node: &str) -> Seen {
        let region = node.split('-').next().unwrap().parse().unwrap();
        Seen { node: node.parse().unwrap(), region, labels: BTreeMap::new(), is_alive: true, app: None }
    }

    fn fleet(size: usize) -> Vec<Seen> {
        (0..size).map(|n| seen(&format!("{}-{n}", ["fra", "iad", "nrt"][n % 3]))).collect()
    }

    fn serving(mut seen: Seen, number: u32) -> Seen {
        let release = ReleaseId { app: "hello".parse().unwrap(), number };
        let serving = Serving { release, manifest: Digest::of(b"m") };
        seen.app =
            Some(AppStatus { app: "hello".parse().unwrap(), serving: Some(serving), refused: None, candidate: None });
        seen
    }

    fn taken(step: Step) -> BTreeSet<NodeName> {
        match step {
            Step::Take(nodes) => nodes,
            other => panic!("{other:?}"),
        }
    }

    fn step(rollout: &RolloutRecord, nodes: &[Seen], now_ms: u64) -> Step {
        next(rollout, &release(), nodes, &Compared::default(), now_ms)
    }

    #[test]
    fn waves_grow_and_nobody_who_was_taken_leaves() {
        let mut rollout = rollout(&["10%", "50%", "100%"]);
        let mut nodes = fleet(9);
        for (wave, size) in [1, 5, 9].into_iter().enumerate() {
            rollout.wave = wave;
            let before = rollout.taken.clone();
            rollout.taken.extend(taken(step(&rollout, &nodes, 0)));
            assert_eq!(rollout.taken.len(), size);
            assert!(rollout.taken.is_superset(&before));
        }
        // A node that comes later is taken by the last wave, whatever its rank.
        nodes.push(seen("fra-late"));
        assert_eq!(taken(step(&rollout, &nodes, 0)).first().unwrap().as_str(), "fra-late");
    }

    #[test]
    fn a_wave_may_be_a_region_or_a_label() {
        let mut nodes = fleet(6);
        nodes[4].labels.insert("tier".into(), "canary".into());
        let names = |waves: &[&str]| {
            taken(step(&rollout(waves), &nodes, 0)).iter().map(|node| node.as_str().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&["region=fra", "100%"]), ["fra-0", "fra-3"]);
        assert_eq!(names(&["tier=canary", "100%"]), ["iad-4"]);
        // One that nobody fits is over at once.
        assert_eq!(step(&rollout(&["region=syd", "100%"]), &nodes, 0), Step::Bake);
    }

    #[test]
    fn a_wave_waits_for_its_nodes_then_bakes_then_gives_way() {
        let mut rollout = rollout(&["region=fra:10s", "100%"]);
        let mut nodes = vec![seen("fra-1"), seen("iad-1")];
        rollout.taken = taken(step(&rollout, &nodes, 0));
        assert_eq!(step(&rollout, &nodes, 1), Step::Wait);
        nodes[0] = serving(nodes[0].clone(), 1);
        assert_eq!(step(&rollout, &nodes, 2), Step::Wait);
        nodes[0] = serving(nodes[0].clone(), 2);
        assert_eq!(step(&rollout, &nodes, 3), Step::Bake);
        rollout.serving_ms = Some(3);
        assert_eq!(step(&rollout, &nodes, 10_002), Step::Wait);
        assert_eq!(step(&rollout, &nodes, 10_003), Step::Next);
        (rollout.wave, rollout.serving_ms) = (1, None);
        rollout.taken.extend(taken(step(&rollout, &nodes, 10_004)));
        nodes[1] = serving(nodes[1].clone(), 2);
        rollout.serving_ms = Some(10_005);
        assert_eq!(step(&rollout, &nodes, 10_005), Step::Done);
    }

    #[test]
    fn a_node_that_refuses_or_falls_silent_halts_it_and_one_that_lacks_the_bytes_does_not() {
        let mut rollout = rollout(&["100%"]);
        let mut nodes = vec![serving(seen("fra-1"), 1), serving(seen("iad-1"), 1)];
        rollout.taken = taken(step(&rollout, &nodes, 0));
        let refuse = |seen: &mut Seen, release: &str, cause: &str| {
            let reason = "no signature".to_owned();
            let refusal = Refusal { release: release.parse().unwrap(), cause: cause.into(), reason };
            seen.app.as_mut().unwrap().refused = Some(refusal);
        };
        for (release, cause) in [("hello@1", "unsigned"), ("hello@2", "fetch")] {
            refuse(&mut nodes[0], release, cause);
            assert_eq!(step(&rollout, &nodes, 1), Step::Wait, "{release} {cause}");
        }
        refuse(&mut nodes[0], "hello@2", "unsigned");
        let Step::Halt(reason) = step(&rollout, &nodes, 1) else { panic!("not halted") };
        assert!(reason.contains("fra-1") && reason.contains("unsigned") && reason.contains("no signature"), "{reason}");
        rollout.gate.refusals_max = 1;
        assert_eq!(step(&rollout, &nodes, 1), Step::Wait);
        nodes[1].is_alive = false;
        let Step::Halt(reason) = step(&rollout, &nodes, 1) else { panic!("not halted") };
        assert!(reason.contains("iad-1 fell silent"), "{reason}");
    }

    #[test]
    fn a_wave_that_never_serves_halts_it() {
        let mut rollout = rollout(&["100%"]);
        let nodes = vec![seen("fra-1")];
        rollout.taken = taken(step(&rollout, &nodes, 0));
        assert_eq!(step(&rollout, &nodes, 600_000), Step::Wait);
        let Step::Halt(reason) = step(&rollout, &nodes, 600_001) else { panic!("not halted") };
        assert!(reason.contains("fra-1"), "{reason}");
    }

    fn load(release: &str, requests: u64, errors: u64, traps: u64, bucket: usize) -> ReleaseLoad {
        let mut times = vec![0; bucket + 1];
        times[bucket] = requests;
        ReleaseLoad { release: release.parse().unwrap(), requests, errors, traps, times }
    }

    #[test]
    fn the_new_release_is_judged_by_the_old_one() {
        let gate = Gate::default();
        let verdict = |new: ReleaseLoad, old: Option<ReleaseLoad>| judge(&gate, &Compared { new: Some(new), old });
        let old = |errors| Some(load("hello@1", 1_000, errors, 0, 14));
        assert_eq!(verdict(load("hello@2", 1_000, 10, 0, 14), old(0)), None);
        assert!(verdict(load("hello@2", 1_000, 11, 0, 14), old(0)).unwrap().contains("fail"));
        // An old release that fails as often says that the fault is elsewhere.
        assert_eq!(verdict(load("hello@2", 1_000, 500, 0, 14), old(495)), None);
        assert!(verdict(load("hello@2", 1_000, 0, 2, 14), old(0)).unwrap().contains("trap"));
        assert!(verdict(load("hello@2", 1_000, 0, 0, 17), old(0)).unwrap().contains("99 of 100"));
        assert_eq!(verdict(load("hello@2", 1_000, 0, 0, 16), old(0)), None);
        // Few requests are no reason, and a first release has nothing to be slower than.
        assert_eq!(verdict(load("hello@2", 49, 49, 49, 14), old(0)), None);
        assert_eq!(verdict(load("hello@2", 1_000, 0, 0, 40), None), None);
        assert!(verdict(load("hello@2", 50, 50, 0, 14), None).is_some());
    }
}
