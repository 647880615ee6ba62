//! Variables and the `{{ name }}` templates that use them, by Spin's rules.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// What an app declares of one variable.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variable {
    /// The value when the deployer gives none.
    pub default: Option<String>,
    /// The value must not be shown.
    pub secret: bool,
}

/// Whether `text` may name a variable: `[a-z][a-z0-9_]*`, no `__`, no `_` at the end.
pub fn is_variable_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('_')
        && !text.contains("__")
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

/// Text with `{{ variable }}` in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    Variable(String),
}

/// A template that can't be read or filled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `{{` without `}}`.
    #[error("'{{{{' without '}}}}' in {0:?}")]
    Open(String),
    /// What stands between the braces is no name.
    #[error("{0:?} is no variable name")]
    Name(String),
    /// The app declares no such variable.
    #[error("variable {0:?} is not declared in [variables]")]
    Undeclared(String),
    /// Declared as required, and nobody gave a value.
    #[error("required variable {0:?} has no value")]
    Missing(String),
}

impl std::str::FromStr for Template {
    type Err = TemplateError;
    fn from_str(text: &str) -> Result<Self, TemplateError> {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("{{") {
            let (name, tail) = after.split_once("}}").ok_or_else(|| TemplateError::Open(text.to_owned()))?;
            let name = name.trim();
            if !is_variable_name(name) {
                return Err(TemplateError::Name(name.to_owned()));
            }
            parts.push(Part::Text(before.to_owned()));
            parts.push(Part::Variable(name.to_owned()));
            rest = tail;
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));
        Ok(Self(parts))
    }
}

impl Template {
    /// The variables that it uses.
    pub fn variables(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|part| match part {
            Part::Variable(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// The text with `values` filled in.
    ///
    /// # Errors
    /// [`TemplateError::Undeclared`] for a variable that `values` lacks.
    pub fn resolve(&self, values: &Values) -> Result<String, TemplateError> {
        let mut out = String::new();
        for part in &self.0 {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Variable(name) => {
                    out.push_str(values.0.get(name).ok_or_else(|| TemplateError::Undeclared(name.clone()))?);
                }
            }
        }
        Ok(out)
    }
}

impl TryFrom<String> for Template {
    type Error = TemplateError;
    fn try_from(text: String) -> Result<Self, TemplateError> {
        text.parse()
    }
}

impl From<Template> for String {
    fn from(template: Template) -> String {
        template.to_string()
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|part| match part {
            Part::Text(text) => f.write_str(text),
            Part::Variable(name) => write!(f, "{{{{ {name} }}}}"),
        })
    }
}

/// A value for each variable of an app. `Debug` shows names only: a value may be a secret.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Values(BTreeMap<String, String>);

impl Values {
    /// `declared`, with `given` over the defaults.
    ///
    /// # Errors
    /// A required variable without a value; a given one that the app does not declare.
    pub fn settle(
        declared: &BTreeMap<String, Variable>,
        given: &BTreeMap<String, String>,
    ) -> Result<Self, TemplateError> {
        if let Some(name) = given.keys().find(|name| !declared.contains_key(*name)) {
            return Err(TemplateError::Undeclared(name.clone()));
        }
        let value = |(name, variable): (&String, &Variable)| {
            let value = given.get(name).or(variable.default.as_ref());
            value.map(|v| (name.clone(), v.clone())).ok_or_else(|| TemplateError::Missing(name.clone()))
        };
        Ok(Self(declared.iter().map(value).collect::<Result<_, _>>()?))
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        let declared = [
            ("host".to_owned(), Variable { default: Some("api.example".into()), secret: false }),
            ("token".to_owned(), Variable { default: None, secret: true }),
        ];
        Values::settle(&declared.into(), &[("token".to_owned(), "s3cret".to_owned())].into()).unwrap()
    }

    #[test]
    fn a_template_is_filled() {
        let template: Template = "https://{{host}}/?t={{ token }}".parse().unwrap();
        assert_eq!(template.resolve(&values()).unwrap(), "https://api.example/?t=s3cret");
        assert_eq!(template.variables().collect::<Vec<_>>(), ["host", "token"]);
        assert_eq!(template.to_string().parse(), Ok(template));
    }

    #[test]
    fn a_mistake_in_a_template_is_named() {
        assert_eq!("{{ a".parse::<Template>(), Err(TemplateError::Open("{{ a".into())));
        assert_eq!("{{ A }}".parse::<Template>(), Err(TemplateError::Name("A".into())));
        let unknown: Template = "{{ nobody }}".parse().unwrap();
        assert_eq!(unknown.resolve(&values()), Err(TemplateError::Undeclared("nobody".into())));
    }

    #[test]
    fn a_required_variable_needs_a_value() {
        let declared = [("token".to_owned(), Variable { default: None, secret: true })].into();
        assert_eq!(Values::settle(&declared, &[].into()), Err(TemplateError::Missing("token".into())));
        let given = [("other".to_owned(), "x".to_owned())].into();
        assert_eq!(Values::settle(&declared, &given), Err(TemplateError::Undeclared("other".into())));
    }

    #[test]
    fn debug_shows_no_value() {
        assert!(!format!("{:?}", values()).contains("s3cret"));
    }
}
