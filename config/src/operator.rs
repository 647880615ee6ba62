//! Operators: who may look at or change a fleet, and what each may do.
//!
//! The control plane reads them in its file. What a node must know of them, names, roles and apps, is told in the signed
//! [`Snapshot`](crate::snapshot::Snapshot), so that both judge by the same list and the same rule.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::AppName;

/// Most operators of a fleet.
pub const OPERATORS_MAX: usize = 1_000;

/// Operators by name, which is that of their certificates.
pub type Operators = BTreeMap<String, OperatorRights>;

/// What an operator may do; each may do what the one before it may.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperatorRole {
    /// Look, and pull from the registry.
    Read,
    /// Push, release, roll out and back, set secrets; write KV.
    Deploy,
    /// Everything: nodes, join tokens, deletions.
    #[default]
    Admin,
}

impl OperatorRole {
    /// As configuration files write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Deploy => "deploy",
            Self::Admin => "admin",
        }
    }
}

/// What is done to an app or to the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Nothing changes.
    Look,
    /// An app changes.
    Deploy,
    /// The fleet changes.
    Administer,
}

impl Act {
    /// The least role that may do it.
    pub fn role(self) -> OperatorRole {
        match self {
            Self::Look => OperatorRole::Read,
            Self::Deploy => OperatorRole::Deploy,
            Self::Administer => OperatorRole::Admin,
        }
    }
}

/// What one operator may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OperatorRights {
    /// What the operator may do.
    #[serde(default)]
    pub role: OperatorRole,
    /// The only apps it is about. None: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apps: Option<BTreeSet<AppName>>,
}

impl OperatorRights {
    /// Whether this may be done to `app`.
    pub fn over_app(&self, act: Act, app: &AppName) -> bool {
        self.role >= act.role() && self.apps.as_ref().is_none_or(|apps| apps.contains(app))
    }

    /// Whether this may be done to what concerns every app. Who is limited to apps may look.
    pub fn over_fleet(&self, act: Act) -> bool {
        self.role >= act.role() && (act == Act::Look || self.apps.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(role: OperatorRole, apps: Option<&[&str]>) -> OperatorRights {
        OperatorRights { role, apps: apps.map(|apps| apps.iter().map(|app| app.parse().unwrap()).collect()) }
    }

    #[test]
    fn each_role_may_what_the_one_before_may_and_no_more() {
        let app = "hello".parse().unwrap();
        let may = |role| {
            let rights = rights(role, None);
            [Act::Look, Act::Deploy, Act::Administer].map(|act| rights.over_app(act, &app) && rights.over_fleet(act))
        };
        assert_eq!(may(OperatorRole::Read), [true, false, false]);
        assert_eq!(may(OperatorRole::Deploy), [true, true, false]);
        assert_eq!(may(OperatorRole::Admin), [true, true, true]);
    }

    #[test]
    fn who_is_limited_to_apps_touches_nothing_else() {
        let rights = rights(OperatorRole::Admin, Some(&["hello"]));
        assert!(rights.over_app(Act::Administer, &"hello".parse().unwrap()));
        assert!(!rights.over_app(Act::Look, &"other".parse().unwrap()));
        assert!(rights.over_fleet(Act::Look) && !rights.over_fleet(Act::Deploy));
        let none = self::rights(OperatorRole::Admin, Some(&[]));
        assert!(!none.over_app(Act::Look, &"hello".parse().unwrap()));
    }

    #[test]
    fn rights_are_read_as_they_were_written_and_nothing_else_is() {
        for rights in [rights(OperatorRole::Read, None), rights(OperatorRole::Deploy, Some(&["a", "b"]))] {
            let text = serde_json::to_string(&rights).unwrap();
            assert_eq!(serde_json::from_str::<OperatorRights>(&text).unwrap(), rights, "{text}");
        }
        for bad in [r#"{"role":"root"}"#, r#"{"role":"read","app":"a"}"#, r#"{"apps":["A b"]}"#] {
            assert!(serde_json::from_str::<OperatorRights>(bad).is_err(), "{bad}");
        }
    }
}
