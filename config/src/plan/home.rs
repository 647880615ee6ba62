//! Homes: which node decides the writes of a store, so that each is made on top of the one before.

use serde::{Deserialize, Serialize};

use crate::{NodeName, StoreName};

/// Most stores that have a home.
pub const HOMES_MAX: usize = 1_024;
/// Most nodes that were the home of one store before and may not all have been told so.
pub const FORMER_MAX: usize = 64;

/// The home of a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Home {
    /// The store.
    pub store: StoreName,
    /// The node that decides.
    pub node: NodeName,
    /// Which home of the store this is. It grows whenever the home is another, and is given once.
    pub term: u64,
    /// Who was the home before, the newest first. What each of them acknowledged is at the home before it decides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<Former>,
    /// Homes of terms up to this are gone and waited for no more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lost: u64,
}

/// A node that was the home of a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Former {
    /// The node.
    pub node: NodeName,
    /// Its newest term.
    pub term: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Home {
    /// The first home of a store.
    pub fn first(store: StoreName, node: NodeName, term: u64) -> Self {
        Self { store, node, term, former: Vec::new(), lost: 0 }
    }

    /// The home that follows this one, on a node and with what is given up. None: it would be the same.
    pub fn next(&self, node: &NodeName, lost: u64, term: u64) -> Option<Self> {
        // What was given up once stays so, and is not given up again by the same words.
        let lost = lost.max(self.lost);
        if (&self.node, self.lost) == (node, lost) {
            return None;
        }
        let mut former = vec![Former { node: self.node.clone(), term: self.term }];
        former.extend(self.former.iter().filter(|known| known.node != self.node).cloned());
        // A term that is given up ends the search for who decided last, so nobody before it is asked.
        former.retain(|known| known.term > lost);
        former.truncate(FORMER_MAX);
        let term = term.max(self.term.saturating_add(1));
        Some(Self { store: self.store.clone(), node: node.clone(), term, former, lost })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> Home {
        Home::first("shop/orders".parse().unwrap(), "fra-1".parse().unwrap(), 4)
    }

    fn former(home: &Home) -> Vec<(&str, u64)> {
        home.former.iter().map(|former| (former.node.as_str(), former.term)).collect()
    }

    #[test]
    fn a_move_remembers_every_home_before_once() {
        let (fra, sin) = ("fra-1".parse().unwrap(), "sin-1".parse().unwrap());
        let second = home().next(&sin, 0, 9).unwrap();
        assert_eq!((second.node.as_str(), second.term, former(&second)), ("sin-1", 9, vec![("fra-1", 4)]));
        let third = second.next(&fra, 0, 9).unwrap();
        assert_eq!((third.term, former(&third)), (10, vec![("sin-1", 9), ("fra-1", 4)]));
        let fourth = third.next(&sin, 0, 11).unwrap();
        assert_eq!(former(&fourth), [("fra-1", 10), ("sin-1", 9)]);
        assert_eq!(fourth.next(&sin, 0, 99), None);
    }

    #[test]
    fn a_home_that_is_lost_is_given_up_once_and_no_later_one_by_the_same_words() {
        let (fra, sin) = ("fra-1".parse().unwrap(), "sin-1".parse().unwrap());
        // The same node begins anew.
        let again = home().next(&fra, 4, 7).unwrap();
        assert_eq!((again.term, again.lost, former(&again)), (7, 4, vec![]));
        assert_eq!(again.next(&fra, 4, 8), None);
        let moved = again.next(&sin, 4, 8).unwrap();
        assert_eq!((moved.lost, former(&moved)), (4, vec![("fra-1", 7)]));
        assert_eq!(moved.next(&sin, 0, 9), None, "a word that was taken back changes nothing");
    }

    #[test]
    fn the_homes_of_old_that_are_told_are_bounded() {
        let mut home = home();
        for number in 0..2 * FORMER_MAX {
            home = home.next(&format!("n{number}").parse().unwrap(), 0, 0).unwrap();
        }
        assert_eq!(home.former.len(), FORMER_MAX);
    }
}
