//! Whom the admin listener lets in, and for what.
//!
//! The list is in the signed plan, so an operator that the control plane removes, limits or revokes is so at every node
//! with the next plan, however long its certificate lasts; and a control plane that is gone changes nothing. Until there
//! is such a list the names in the node's own file count, and without any nobody is let in.

use http::Method;
use selvage_certs::{OperatorName, Role};
use selvage_config::AppName;
use selvage_config::operator::{Act, OperatorRights, OperatorRole, Operators};

use super::kv;
use crate::release::ledger::{Ledger, Standing};

/// Whom the listener lets in.
#[derive(Debug, Clone)]
pub struct Access {
    ledger: Option<Ledger>,
    named: Operators,
}

/// Why an operator is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The plan names operators, and not this one.
    #[error("{name} is no operator of this fleet")]
    Unlisted {
        /// Who.
        name: String,
    },
    /// No plan names operators yet, and the node's file does not name this one.
    #[error("no signed plan says yet who the operators are, and this node's file does not name {name}")]
    Unsaid {
        /// Who.
        name: String,
    },
    /// Its certificates were revoked.
    #[error("the certificates of operator {name} were revoked")]
    Revoked {
        /// Who.
        name: String,
    },
    /// Its role is too low.
    #[error("operator {name} has the role {}, this takes {}", role.as_str(), needed.as_str())]
    Role {
        /// Who.
        name: String,
        /// Its role.
        role: OperatorRole,
        /// The least that may do this.
        needed: OperatorRole,
    },
    /// It is limited to other apps.
    #[error("operator {name} is limited to other apps")]
    Apps {
        /// Who.
        name: String,
    },
}

impl Refused {
    /// What can be done.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unlisted { .. } => "operators stand under [[operators]] in the control plane's file",
            Self::Unsaid { .. } => "wait for a plan, or name it under [[admin.operators]] in the node's file",
            Self::Revoked { .. } => "use a certificate of another name",
            Self::Role { .. } | Self::Apps { .. } => {
                "roles and apps of operators stand under [[operators]] in the control plane's file"
            }
        }
    }
}

impl Access {
    /// Who stands in the plans that `ledger` takes; before there is such a list, and without a ledger, who is `named`.
    pub fn new(ledger: Option<Ledger>, named: Operators) -> Self {
        Self { ledger, named }
    }

    /// Whether `operator` may ask this.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn admit(&self, operator: &OperatorName, method: &Method, path: &str) -> Result<(), Refused> {
        let rights = self.rights(operator)?;
        let name = || operator.as_str().to_owned();
        let (act, app) = asked(method, path);
        if rights.role < act.role() {
            return Err(Refused::Role { name: name(), role: rights.role, needed: act.role() });
        }
        let may = match &app {
            Some(app) => rights.over_app(act, app),
            None => rights.over_fleet(act),
        };
        if may { Ok(()) } else { Err(Refused::Apps { name: name() }) }
    }

    fn rights(&self, operator: &OperatorName) -> Result<OperatorRights, Refused> {
        let name = operator.as_str().to_owned();
        let uri = Role::Operator { name: operator.clone() }.uri();
        let standing = self.ledger.as_ref().map_or(Standing::Unsaid, |ledger| ledger.standing(&name, &uri));
        match standing {
            Standing::Listed(rights) => Ok(rights),
            Standing::Unlisted => Err(Refused::Unlisted { name }),
            Standing::Revoked => Err(Refused::Revoked { name }),
            Standing::Unsaid => self.named.get(&name).cloned().ok_or(Refused::Unsaid { name }),
        }
    }
}

/// What a request does, and to which app if it is one app's. What is not known for sure concerns the whole fleet.
fn asked(method: &Method, path: &str) -> (Act, Option<AppName>) {
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    match path.strip_prefix("/kv/") {
        Some(rest) => {
            let act = if is_read { Act::Look } else { Act::Deploy };
            match kv::place(rest) {
                Some((app, ..)) => (act, Some(app)),
                // It is answered as a mistake; nobody learns by it what others have.
                None => (act, None),
            }
        }
        None if is_read => (Act::Look, None),
        None => (Act::Administer, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_to_be_one_apps_concerns_the_fleet() {
        let app = |name: &str| Some(name.parse().unwrap());
        for (method, path, want) in [
            (Method::GET, "/kv/shop/default/k", (Act::Look, app("shop"))),
            (Method::GET, "/kv/shop/default", (Act::Look, app("shop"))),
            (Method::PUT, "/kv/shop/default/k", (Act::Deploy, app("shop"))),
            (Method::DELETE, "/kv/shop/default/../../other/default/k", (Act::Deploy, app("shop"))),
            (Method::POST, "/kv/shop/default/k", (Act::Deploy, app("shop"))),
            (Method::PUT, "/kv/sh%6fp/default/k", (Act::Deploy, None)),
            (Method::PUT, "/kv//shop/default/k", (Act::Deploy, None)),
            (Method::GET, "/kv/", (Act::Look, None)),
            (Method::PUT, "//kv/shop/default/k", (Act::Administer, None)),
            (Method::POST, "/peers/isolation", (Act::Administer, None)),
            (Method::GET, "/peers", (Act::Look, None)),
            (Method::CONNECT, "/status", (Act::Administer, None)),
        ] {
            assert_eq!(asked(&method, path), want, "{method} {path}");
        }
    }
}
