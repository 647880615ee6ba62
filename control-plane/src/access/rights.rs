//! What an operator may do: by role, by app, and for a registry client by the scopes of its token.

use std::collections::BTreeSet;

use selvage_config::AppName;
use selvage_config::control_plane::Operator;
use selvage_config::oci::Repository;
use selvage_config::operator::{Act, OperatorRights};
use serde::{Deserialize, Serialize};

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

    /// What it does to the app that a repository is of.
    fn act(self) -> Act {
        match self {
            Self::Pull => Act::Look,
            Self::Push => Act::Deploy,
            Self::Delete => Act::Administer,
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
    own: OperatorRights,
    /// Set where a registry token proved who asks: it may do no more than this, and nothing but to the registry.
    scopes: Option<Vec<Scope>>,
}

impl Rights {
    pub(crate) fn of(operator: &Operator) -> Self {
        Self { own: operator.rights(), scopes: None }
    }

    /// The same, for a request that shows a registry token with these scopes.
    pub(crate) fn scoped(self, scopes: Vec<Scope>) -> Self {
        Self { scopes: Some(scopes), ..self }
    }

    /// Whether a registry token proved who asks.
    pub(crate) fn is_scoped(&self) -> bool {
        self.scopes.is_some()
    }

    /// Whether this may be done to `app`.
    pub(crate) fn over_app(&self, act: Act, app: &AppName) -> bool {
        self.scopes.is_none() && self.own.over_app(act, app)
    }

    /// Whether this may be done to what concerns every app.
    pub(crate) fn over_fleet(&self, act: Act) -> bool {
        self.scopes.is_none() && self.own.over_fleet(act)
    }

    /// Whether the operator may know that there is this repository, whatever the token was asked for.
    pub(crate) fn sees(&self, repository: &Repository) -> bool {
        let unscoped = Self { scopes: None, ..self.clone() };
        unscoped.over_repository(Action::Pull, repository)
    }

    /// Whether this may be done to `repository`.
    pub(crate) fn over_repository(&self, action: Action, repository: &Repository) -> bool {
        let by_role = self.own.role >= action.act().role();
        let last = repository.as_str().rsplit('/').next().unwrap_or_default();
        let by_app = self.own.apps.as_ref().is_none_or(|apps| apps.iter().any(|app| app.as_str() == last));
        let by_scope = self.scopes.as_ref().is_none_or(|scopes| {
            scopes.iter().any(|scope| scope.repository == *repository && scope.actions.contains(&action))
        });
        by_role && by_app && by_scope
    }
}

#[cfg(test)]
mod tests {
    use selvage_config::operator::OperatorRole;

    use super::*;

    fn rights(role: OperatorRole, apps: Option<&[&str]>) -> Rights {
        let apps = apps.map(|apps| apps.iter().map(|app| app.parse().unwrap()).collect());
        Rights { own: OperatorRights { role, apps }, scopes: None }
    }

    #[test]
    fn who_is_limited_to_apps_touches_no_other_repository() {
        let rights = rights(OperatorRole::Admin, Some(&["hello"]));
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
        let admin = self::rights(OperatorRole::Admin, None).scoped(vec![scope(&[Action::Pull])]);
        assert!(!admin.over_repository(Action::Push, &repository));
        assert!(!admin.over_repository(Action::Pull, &"other".parse().unwrap()));
        assert!(!admin.over_fleet(Act::Look) && !admin.over_app(Act::Look, &"hello".parse().unwrap()));
    }
}
