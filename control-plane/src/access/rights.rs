//! What an operator may do: by role, by app, and for a registry client by the scopes of its token.

use std::collections::BTreeSet;

use selvage_config::AppName;
use selvage_config::control_plane::{Operator, OperatorRole};
use selvage_config::oci::Repository;
use serde::{Deserialize, Serialize};

/// What is done to an app or to the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Look,
    Deploy,
    Administer,
}

/// What is done to a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    Pull,
    Push,
    Delete,
}

impl Action {
    /// As scopes write it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Delete => "delete",
        }
    }
}

/// A repository and what may be done to it, as a registry token carries it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Scope {
    pub(crate) repository: Repository,
    pub(crate) actions: BTreeSet<Action>,
}

/// What an operator may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rights {
    role: OperatorRole,
    apps: Option<BTreeSet<AppName>>,
    /// Set where a registry token proved who asks: it may do no more than this, and nothing but to the registry.
    scopes: Option<Vec<Scope>>,
}

impl Rights {
    pub(crate) fn of(operator: &Operator) -> Self {
        Self { role: operator.role, apps: operator.apps.clone(), scopes: None }
    }

    /// The same, for a request that shows a registry token with these scopes.
    pub(crate) fn scoped(self, scopes: Vec<Scope>) -> Self {
        Self { scopes: Some(scopes), ..self }
    }

    /// Whether a registry token proved who asks.
    pub(crate) fn is_scoped(&self) -> bool {
        self.scopes.is_some()
    }

    fn may(&self, act: Act) -> bool {
        self.scopes.is_none()
            && match act {
                Act::Look => true,
                Act::Deploy => self.role >= OperatorRole::Deploy,
                Act::Administer => self.role == OperatorRole::Admin,
            }
    }

    /// Whether this may be done to `app`.
    pub(crate) fn over_app(&self, act: Act, app: &AppName) -> bool {
        self.may(act) && self.apps.as_ref().is_none_or(|apps| apps.contains(app))
    }

    /// Whether this may be done to what concerns every app.
    pub(crate) fn over_fleet(&self, act: Act) -> bool {
        self.may(act) && (act == Act::Look || self.apps.is_none())
    }

    /// Whether the operator may know that there is this repository, whatever the token was asked for.
    pub(crate) fn sees(&self, repository: &Repository) -> bool {
        let unscoped = Self { scopes: None, ..self.clone() };
        unscoped.over_repository(Action::Pull, repository)
    }

    /// Whether this may be done to `repository`.
    pub(crate) fn over_repository(&self, action: Action, repository: &Repository) -> bool {
        let by_role = match action {
            Action::Pull => true,
            Action::Push => self.role >= OperatorRole::Deploy,
            Action::Delete => self.role == OperatorRole::Admin,
        };
        let last = repository.as_str().rsplit('/').next().unwrap_or_default();
        let by_app = self.apps.as_ref().is_none_or(|apps| apps.iter().any(|app| app.as_str() == last));
        let by_scope = self.scopes.as_ref().is_none_or(|scopes| {
            scopes.iter().any(|scope| scope.repository == *repository && scope.actions.contains(&action))
        });
        by_role && by_app && by_scope
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(role: OperatorRole, apps: Option<&[&str]>) -> Rights {
        let apps = apps.map(|apps| apps.iter().map(|app| app.parse().unwrap()).collect());
        Rights { role, apps, scopes: None }
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
        let may = |name: &str| rights.over_repository(Action::Push, &name.parse().unwrap());
        assert!(may("hello") && may("apps/hello"));
        assert!(!may("hello/other") && !may("other") && !may("xhello"));
    }

    #[test]
    fn a_scope_narrows_and_never_widens() {
        let repository: Repository = "apps/hello".parse().unwrap();
        let scope =
            |actions: &[Action]| Scope { repository: repository.clone(), actions: actions.iter().copied().collect() };
        let reader = rights(OperatorRole::Read, None).scoped(vec![scope(&[Action::Pull, Action::Push])]);
        assert!(reader.over_repository(Action::Pull, &repository));
        assert!(!reader.over_repository(Action::Push, &repository));
        let admin = Rights { role: OperatorRole::Admin, apps: None, scopes: None }.scoped(vec![scope(&[Action::Pull])]);
        assert!(!admin.over_repository(Action::Push, &repository));
        assert!(!admin.over_repository(Action::Pull, &"other".parse().unwrap()));
        assert!(!admin.over_fleet(Act::Look) && !admin.over_app(Act::Look, &"hello".parse().unwrap()));
    }
}
