//! What is made of the samples: what grew, and what failed.

use std::fmt;

use crate::figures::median;
use crate::process::{Resident, descriptors, resident, threads};
use crate::soaked::client::Count;

/// How much more memory the last quarter may have than the second: the first one fills caches and pools.
const GROWTH_MAX: f64 = 1.1;
/// How many more descriptors: hostile requests come and go, each with its two ends of a connection.
const DESCRIPTORS_SLACK: f64 = 8.0;
/// Fewer samples than this have no quarters.
const SAMPLES_MIN: usize = 8;

/// The process at one moment.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    resident: Resident,
    descriptors: usize,
    threads: usize,
}

impl Sample {
    pub(crate) fn take() -> anyhow::Result<Self> {
        Ok(Self { resident: resident()?, descriptors: descriptors()?, threads: threads()? })
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident, descriptors, threads } = self;
        write!(f, "{:>6.1} MiB  {descriptors} descriptors  {threads} threads", resident.kib / 1024.0)
    }
}

/// All that is not as it should be.
pub(crate) fn complaints(samples: &[Sample], count: &Count) -> Vec<String> {
    let mut complaints = Vec::new();
    let (failures, reasons) = (count.failures(), count.reasons().join(" | "));
    if failures > 0 {
        complaints.push(format!("{failures} failures of healthy apps, the first: {reasons}"));
    }
    let (answered, hostile, deploys) = count.so_far();
    if answered == 0 || hostile == 0 || deploys == 0 {
        complaints
            .push(format!("{answered} answers, {hostile} hostile requests, {deploys} deploys: that shows nothing"));
    }
    if samples.len() < SAMPLES_MIN {
        complaints.push(format!("{} samples: too short to say what grows", samples.len()));
        return complaints;
    }
    let quarter = samples.len() / 4;
    let (second, last) = (&samples[quarter..2 * quarter], &samples[samples.len() - quarter..]);
    let of = |samples: &[Sample], figure: fn(&Sample) -> f64| median(&samples.iter().map(figure).collect::<Vec<_>>());
    let mib = |sample: &Sample| sample.resident.kib / 1024.0;
    let (before, after) = (of(second, mib), of(last, mib));
    if after > before * GROWTH_MAX {
        complaints.push(format!("memory grew from {before:.1} to {after:.1} MiB"));
    }
    let open = |sample: &Sample| sample.descriptors as f64;
    let (before, after) = (of(second, open), of(last, open));
    if after > before + DESCRIPTORS_SLACK {
        complaints.push(format!("descriptors grew from {before:.0} to {after:.0}"));
    }
    complaints
}
