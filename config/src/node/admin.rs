//! Whom a node's admin listener lets in before a signed plan tells it.

use std::collections::BTreeSet;

use serde::Deserialize;

use crate::AppName;
use crate::invalid::Problems;
use crate::operator::{OPERATORS_MAX, OperatorRights, OperatorRole, Operators};

/// The admin listener.
#[derive(Debug, Clone, Deserialize, Default, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Admin {
    /// Operators whose certificates count while the node has no signed plan with a list of operators. Such a list stands
    /// in place of this one, whole. Default none: then nobody is let in until there is one.
    #[serde(default)]
    pub operators: Vec<AdminOperator>,
}

/// An operator, by the name of a certificate.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct AdminOperator {
    /// The name in the certificate.
    pub name: String,
    /// What the operator may do. There is no default.
    pub role: OperatorRole,
    /// The only apps whose stores it may read and write. Default: all.
    #[serde(default)]
    pub apps: Option<BTreeSet<AppName>>,
}

impl Admin {
    /// The operators with what they may do.
    pub fn named(&self) -> Operators {
        let rights = |operator: &AdminOperator| OperatorRights { role: operator.role, apps: operator.apps.clone() };
        self.operators.iter().map(|operator| (operator.name.clone(), rights(operator))).collect()
    }

    pub(super) fn problems(&self, problems: &mut Problems) {
        if self.operators.len() > OPERATORS_MAX {
            let message = format!("{} operators, the most is {OPERATORS_MAX}", self.operators.len());
            problems.add(None, "admin.operators", message, None);
        }
        for (index, operator) in self.operators.iter().enumerate() {
            let field = format!("admin.operators[{index}].name");
            if operator.name.is_empty() {
                problems.add(None, field, "must not be empty", None);
            } else if self.operators[..index].iter().any(|other| other.name == operator.name) {
                problems.add(None, field, format!("{:?} is there twice", operator.name), None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::invalid::Invalid;
    use crate::node::NodeConfig;

    fn parse(table: &str) -> Result<Admin, Invalid> {
        let text = format!("name='a'\nregion='b'\nstate_dir='s'\nlisten={{http='127.0.0.1:0'}}\n{table}");
        NodeConfig::parse(std::path::Path::new("/node.toml"), &text).map(|config| config.admin)
    }

    #[test]
    fn nobody_is_named_unless_the_file_does_it_and_a_role_must_be_said() {
        assert!(parse("").unwrap().named().is_empty());
        let named = parse("[[admin.operators]]\nname='ada'\nrole='read'\napps=['shop']\n").unwrap().named();
        assert_eq!(named["ada"].role, OperatorRole::Read);
        assert_eq!(named["ada"].apps, Some(["shop".parse().unwrap()].into()));
        for bad in ["name='ada'", "name='ada'\nrole='root'", "name='ada'\nrole='read'\nappz=[]"] {
            assert!(parse(&format!("[[admin.operators]]\n{bad}\n")).unwrap_err().places()[0].line.is_some(), "{bad}");
        }
        for bad in ["{name='',role='read'}", "{name='a',role='read'},{name='a',role='admin'}"] {
            let places = parse(&format!("[admin]\noperators=[{bad}]\n")).unwrap_err().places();
            assert!(places[0].field.starts_with("admin.operators["), "{places:?}");
        }
    }
}
