//! What a place of stores can do: the matrix of docs/BACKENDS.md, which a test holds against this.

use selvage_config::node::KvBackendKind;
use selvage_sync::store::LARGE_BYTES_MAX;

/// Over how many nodes something holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// On the node that is asked, and not between nodes.
    Node,
    /// Over all nodes.
    Fleet,
}

/// What a place of stores can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Abilities {
    /// Its name in the matrix.
    pub place: &'static str,
    /// Keys that end.
    pub ttl: bool,
    /// Bytes beside a value.
    pub metadata: bool,
    /// Where two conditional writes (`set-if`, `cas`) can't both succeed.
    pub condition: Reach,
    /// Counters that lose no increment, whichever nodes count.
    pub counters: bool,
    /// Over what an increment's answer is the exact sum of all before it.
    pub exact_counters: Reach,
    /// Over what a read shows every write that was answered before.
    pub fresh_reads: Reach,
    /// Listings in the order of keys, by pages.
    pub ordered_list: bool,
    /// `selvage kv watch`.
    pub watch: bool,
    /// Reads and writes while the node is cut off from everybody.
    pub alone: bool,
    /// The longest value that the node's file may allow, bytes.
    pub value_bytes_max: usize,
}

impl Abilities {
    /// Of the node's own replicated KV.
    pub const MESH: Self = Self {
        place: "mesh",
        ttl: true,
        metadata: true,
        condition: Reach::Node,
        counters: true,
        exact_counters: Reach::Node,
        fresh_reads: Reach::Node,
        ordered_list: true,
        watch: true,
        alone: true,
        value_bytes_max: LARGE_BYTES_MAX,
    };

    /// Of a placement of the mesh that the node does not hold. Over which nodes a condition holds is as in the mesh: over all
    /// if the store has a home.
    pub const ELSEWHERE: Self = Self { place: "elsewhere", watch: false, alone: false, ..Self::MESH };

    /// Of a Redis server.
    pub const REDIS: Self = Self {
        place: "redis",
        condition: Reach::Fleet,
        exact_counters: Reach::Fleet,
        fresh_reads: Reach::Fleet,
        watch: false,
        alone: false,
        ..Self::MESH
    };

    /// Of a bucket of NATS JetStream.
    pub const NATS: Self = Self { place: "nats", ..Self::REDIS };

    /// Of a kind of backend.
    pub fn of(kind: KvBackendKind) -> &'static Self {
        match kind {
            KvBackendKind::Redis => &Self::REDIS,
            KvBackendKind::Nats => &Self::NATS,
        }
    }

    /// The matrix, a row each: what, and how it is in each of `places`.
    pub fn matrix(places: &[&Self]) -> Vec<Vec<String>> {
        let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
        let reach = |reach: Reach| match reach {
            Reach::Node => "on one node".to_owned(),
            Reach::Fleet => "over all nodes".to_owned(),
        };
        let row = |what: &str, cell: &dyn Fn(&Self) -> String| {
            std::iter::once(what.to_owned()).chain(places.iter().map(|place| cell(place))).collect()
        };
        vec![
            row("", &|of| of.place.to_owned()),
            row("ttl", &|of| yes(of.ttl)),
            row("metadata", &|of| yes(of.metadata)),
            row("cas", &|of| reach(of.condition)),
            row("increments all count", &|of| yes(of.counters)),
            row("an increment's answer is exact", &|of| reach(of.exact_counters)),
            row("reads show every write before", &|of| reach(of.fresh_reads)),
            row("list in order, by pages", &|of| yes(of.ordered_list)),
            row("watch", &|of| yes(of.watch)),
            row("works while cut off", &|of| yes(of.alone)),
            row("longest value, MiB", &|of| (of.value_bytes_max >> 20).to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_matrix_of_the_documentation_is_what_the_tests_know() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/BACKENDS.md");
        let text = std::fs::read_to_string(path).unwrap();
        let mut rows =
            Abilities::matrix(&[&Abilities::MESH, &Abilities::ELSEWHERE, &Abilities::REDIS, &Abilities::NATS])
                .into_iter();
        let line = |cells: Vec<String>| format!("| {} |", cells.join(" | "));
        let head = line(rows.next().unwrap());
        assert!(text.contains(&format!("{head}\n|---|---|---|---|---|\n")), "{head}");
        for row in rows.map(line) {
            assert!(text.lines().any(|line| line == row), "{row}");
        }
    }
}
