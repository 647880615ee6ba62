//! Whose signatures count, for which apps: the policy file that a node and `selvage verify` read.
//!
//! The first rule that covers an app decides about it; an app that no rule covers does not run. Patterns of identities are
//! whole: one that could match a part of a longer name is refused when the file is read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::invalid::{Invalid, Problems};
use crate::oci::Repository;
use crate::signature::PREDICATE_SIGN;

/// Largest policy file, bytes.
pub const POLICY_BYTES_MAX: usize = 1024 * 1024;
/// Most rules of a policy.
pub const RULES_MAX: usize = 1_024;
/// Most signers of a rule, or of one attestation that it demands: each costs every bundle one check.
pub const SIGNERS_MAX: usize = 32;
/// Most attestations that a rule demands.
pub const ATTESTATIONS_MAX: usize = 16;
/// Most registries that a policy names.
pub const REGISTRIES_MAX: usize = 64;
/// Longest pattern, bytes.
const PATTERN_BYTES_MAX: usize = 1_024;
/// What a rule calls the fleet's own registry: all that is no mirror of another one.
const OWN: &str = "own";

/// A pattern, with its place in the file.
pub type Pattern = Spanned<String>;

/// A policy: rules in order.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// The registries that are mirrored, by what their repositories begin with here (`prefix` of the control plane's
    /// `[[registry.upstreams]]`). Rules are for one of them, or for what is in none.
    #[serde(default)]
    pub registries: Vec<Repository>,
    /// The first that covers an app decides. None does: it does not run.
    #[serde(default, rename = "rule")]
    pub rules: Vec<Rule>,
}

/// Who must have signed some apps.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Names of apps; a `*` at the end stands for any rest. Default: all.
    #[serde(default = "all")]
    pub apps: Vec<String>,
    /// Whence it must come: one of the policy's `registries`, or `own` for what is in none of them. Default: wherever.
    pub registry: Option<Spanned<String>>,
    /// All that the policy names: what is in one of them is not `own`.
    #[serde(skip)]
    registries: Vec<Repository>,
    /// Repositories, by the names that they have in `registry` where that is said; a `*` at the end stands for any rest. Default: all.
    #[serde(default = "all")]
    pub repositories: Vec<String>,
    /// Whose signatures count.
    #[serde(default)]
    pub signers: Vec<Signer>,
    /// How many of the signers must have signed. Default 1.
    #[serde(default = "one")]
    pub threshold: usize,
    /// Whether cosign 2's `.sig` tags of keys count where an artifact has no bundle. Default no.
    #[serde(default)]
    pub legacy_signatures: bool,
    /// Annotations that each signature must carry.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// Attestations that must be there besides the signatures.
    #[serde(default)]
    pub attestations: Vec<Demand>,
}

/// Somebody whose signature counts: a key, or an identity that a certificate authority vouches for.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signer {
    /// What verdicts call it. Default: the key's file or the identity.
    pub name: Option<String>,
    /// A public key, PEM.
    pub key: Option<PathBuf>,
    /// The identity in the certificate, exactly.
    pub identity: Option<String>,
    /// A pattern that the whole identity matches: `^…$`.
    pub identity_pattern: Option<Pattern>,
    /// Who vouched for the identity (OIDC issuer), exactly.
    pub issuer: Option<String>,
    /// A pattern that the whole issuer matches: `^…$`.
    pub issuer_pattern: Option<Pattern>,
    /// The authorities and logs (`trusted_root.json`). Needed for identities, and for keys whose log counts.
    pub trusted_root: Option<PathBuf>,
    /// Whether the signature must be in a transparency log. Default: yes for identities, no for keys.
    pub log: Option<bool>,
    /// Whether the certificate must be in a certificate transparency log. Default yes.
    pub certificate_log: Option<bool>,
}

/// An attestation that must be there.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Demand {
    /// Its predicate type, as `https://slsa.dev/provenance/v1`.
    pub predicate_type: String,
    /// Whose attestations count.
    pub signers: Vec<Signer>,
    /// How many of them must have attested. Default 1.
    #[serde(default = "one")]
    pub threshold: usize,
    /// What the predicate must say: JSON pointer → text, as `"/runDetails/builder/id" = "https://…"`.
    #[serde(default)]
    pub says: BTreeMap<String, String>,
}

/// Something in a policy that works, and is likely not meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Lint {
    /// Where: `rule[0].signers[1].identity_pattern`.
    pub field: String,
    /// What.
    pub message: String,
}

fn all() -> Vec<String> {
    vec!["*".to_owned()]
}

fn one() -> usize {
    1
}

impl Policy {
    /// Reads the text of `file`; paths become absolute.
    ///
    /// # Errors
    /// Every mistake with its place.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Invalid> {
        if text.len() > POLICY_BYTES_MAX {
            return Err(Invalid::whole(file, format!("larger than {POLICY_BYTES_MAX} bytes"), None));
        }
        let mut policy: Self = toml::from_str(text).map_err(|e| Invalid::of_toml(file, text, &e))?;
        let base = file.parent().unwrap_or(Path::new(""));
        let mut problems = Problems::default();
        if policy.rules.len() > RULES_MAX {
            problems.add(None, "rule", format!("more than {RULES_MAX} rules"), None);
        }
        check_registries(&policy.registries, &mut problems);
        for (index, rule) in policy.rules.iter_mut().enumerate() {
            let field = format!("rule[{index}]");
            rule.registries.clone_from(&policy.registries);
            rule.check(&field, &mut problems);
            let demanded = rule.attestations.iter_mut().flat_map(|demand| &mut demand.signers);
            for signer in rule.signers.iter_mut().chain(demanded) {
                for path in [&mut signer.key, &mut signer.trusted_root].into_iter().flatten() {
                    *path = base.join(&path);
                }
            }
        }
        problems.settle(file, text, Some(policy))
    }

    /// The files that it names.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let signers = self
            .rules
            .iter()
            .flat_map(|rule| rule.signers.iter().chain(rule.attestations.iter().flat_map(|demand| &demand.signers)));
        signers.flat_map(|signer| [&signer.key, &signer.trusted_root]).flatten()
    }

    /// What works and is likely not meant.
    pub fn lints(&self) -> Vec<Lint> {
        let mut lints = Vec::new();
        if self.rules.is_empty() {
            lints.push(Lint { field: "rule".into(), message: "there is no rule, so nothing runs".into() });
        }
        for (index, registry) in self.registries.iter().enumerate() {
            if !self.rules.iter().any(|rule| rule.registry() == Some(registry.as_str())) {
                let message = format!("no rule is for {registry}");
                lints.push(Lint { field: format!("registries[{index}]"), message });
            }
        }
        for (index, rule) in self.rules.iter().enumerate() {
            let covered = self.rules[..index].iter().any(|before| before.covers_all());
            if covered {
                let message = "never reached: a rule before it covers everything".into();
                lints.push(Lint { field: format!("rule[{index}]"), message });
            }
            if rule.legacy_signatures {
                let message = "cosign 2's .sig form has no predicate and no log".into();
                lints.push(Lint { field: format!("rule[{index}].legacy_signatures"), message });
            }
            for (field, signer) in rule.signers(&format!("rule[{index}]")) {
                signer.lint(&field, &mut lints);
            }
        }
        lints
    }
}

impl Rule {
    /// A rule for every app and repository: one of these signers suffices.
    pub fn of(signers: Vec<Signer>, legacy_signatures: bool) -> Self {
        Self {
            apps: all(),
            registry: None,
            registries: Vec::new(),
            repositories: all(),
            signers,
            threshold: one(),
            legacy_signatures,
            annotations: BTreeMap::new(),
            attestations: Vec::new(),
        }
    }

    fn registry(&self) -> Option<&str> {
        self.registry.as_ref().map(|registry| registry.get_ref().as_str())
    }

    /// What a repository is called where this rule looks. None: it looks elsewhere.
    fn called<'r>(&self, repository: &'r str) -> Option<&'r str> {
        match self.registry() {
            None => Some(repository),
            Some(OWN) => {
                self.registries.iter().all(|other| below(other.as_str(), repository).is_none()).then_some(repository)
            }
            Some(registry) => below(registry, repository),
        }
    }

    /// Whether it decides about this app.
    pub fn covers(&self, app: &str, repository: &str) -> bool {
        let fits = |patterns: &[String], name: &str| {
            patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name == pattern,
            })
        };
        fits(&self.apps, app) && self.called(repository).is_some_and(|name| fits(&self.repositories, name))
    }

    fn covers_all(&self) -> bool {
        let is_all = |patterns: &[String]| patterns.iter().any(|pattern| pattern == "*");
        self.registry.is_none() && is_all(&self.apps) && is_all(&self.repositories)
    }

    /// Every signer with its place.
    fn signers(&self, field: &str) -> Vec<(String, &Signer)> {
        let own = self.signers.iter().enumerate().map(|(index, s)| (format!("{field}.signers[{index}]"), s));
        let demanded = self.attestations.iter().enumerate().flat_map(|(demand, attestation)| {
            let place = move |index: usize| format!("attestations[{demand}].signers[{index}]");
            attestation.signers.iter().enumerate().map(move |(index, signer)| (place(index), signer))
        });
        own.chain(demanded.map(|(place, signer)| (format!("{field}.{place}"), signer))).collect()
    }

    fn check(&self, field: &str, problems: &mut Problems) {
        for (name, patterns) in [("apps", &self.apps), ("repositories", &self.repositories)] {
            let star =
                patterns.iter().any(|pattern| pattern.trim_end_matches('*').contains('*') || pattern.ends_with("**"));
            if patterns.is_empty() || star {
                problems.add(None, format!("{field}.{name}"), "names, or beginnings with one * at the end", None);
            }
        }
        if let Some(registry) = &self.registry {
            let name = registry.get_ref();
            if name != OWN && !self.registries.iter().any(|known| known.as_str() == name) {
                let hint = "name the control plane's prefix of it in `registries`, before the first rule; or \"own\"";
                let message = format!("{name:?} is none of the policy's registries");
                problems.add(Some(registry.span()), format!("{field}.registry"), message, Some(hint));
            }
        }
        enough(&format!("{field}.threshold"), self.threshold, &self.signers, problems);
        if self.attestations.len() > ATTESTATIONS_MAX {
            problems.add(None, format!("{field}.attestations"), format!("more than {ATTESTATIONS_MAX}"), None);
        }
        for (index, demand) in self.attestations.iter().enumerate() {
            let field = format!("{field}.attestations[{index}]");
            enough(&format!("{field}.threshold"), demand.threshold, &demand.signers, problems);
            if demand.predicate_type.is_empty() || demand.predicate_type == PREDICATE_SIGN {
                let hint = "a signature is demanded by signers; name another predicate type here";
                problems.add(None, format!("{field}.predicate_type"), "is no attestation", Some(hint));
            }
            if demand.says.keys().any(|pointer| !pointer.starts_with('/')) {
                problems.add(None, format!("{field}.says"), "keys are JSON pointers: they start with /", None);
            }
        }
        for (field, signer) in self.signers(field) {
            signer.check(&field, problems);
        }
    }
}

/// What a repository of the registry mirrored at `prefix` is called there.
fn below<'r>(prefix: &str, repository: &'r str) -> Option<&'r str> {
    repository.strip_prefix(prefix)?.strip_prefix('/')
}

/// Registries each of whose repositories is of one of them alone.
fn check_registries(registries: &[Repository], problems: &mut Problems) {
    if registries.len() > REGISTRIES_MAX {
        problems.add(None, "registries", format!("more than {REGISTRIES_MAX}"), None);
    }
    for (index, registry) in registries.iter().enumerate() {
        let field = format!("registries[{index}]");
        if registry.as_str() == OWN {
            let hint = "rules call by it what is in none of the others; give the upstream another prefix";
            problems.add(None, field, format!("{OWN:?} is the fleet's own registry"), Some(hint));
            continue;
        }
        let is_within = |other: &Repository| other == registry || below(other.as_str(), registry.as_str()).is_some();
        let others = registries.iter().enumerate().filter(|(place, _)| *place != index);
        if let Some((_, other)) =
            others.clone().find(|(place, other)| is_within(other) && (*other != registry || *place < index))
        {
            problems.add(None, field, format!("{registry} is {other}, or within it"), None);
        }
    }
}

/// A threshold that can be met: by different signers, of whom there are not too many.
fn enough(field: &str, threshold: usize, signers: &[Signer], problems: &mut Problems) {
    if threshold == 0 || threshold > signers.len() {
        let message = format!("{threshold} of {} signers", signers.len());
        problems.add(None, field, message, Some("at least 1, at most as many as there are signers"));
    }
    if signers.len() > SIGNERS_MAX {
        problems.add(None, field, format!("more than {SIGNERS_MAX} signers"), None);
    }
}

impl Signer {
    /// A key whose log does not count.
    pub fn of_key(key: PathBuf) -> Self {
        Self {
            name: None,
            key: Some(key),
            identity: None,
            identity_pattern: None,
            issuer: None,
            issuer_pattern: None,
            trusted_root: None,
            log: None,
            certificate_log: None,
        }
    }

    /// What verdicts call it.
    pub fn title(&self) -> String {
        let pattern = self.identity_pattern.as_ref().map(|pattern| pattern.get_ref().clone());
        let key = self.key.as_ref().map(|key| key.display().to_string());
        self.name.clone().or_else(|| self.identity.clone()).or(pattern).or(key).unwrap_or_default()
    }

    fn check(&self, field: &str, problems: &mut Problems) {
        let has_identity = self.identity.is_some() || self.identity_pattern.is_some();
        let has_issuer = self.issuer.is_some() || self.issuer_pattern.is_some();
        if self.key.is_some() == has_identity || (self.key.is_some() && (has_issuer || self.certificate_log.is_some()))
        {
            let hint = "key = \"…\", or identity and issuer";
            problems.add(None, field, "is either a key or an identity", Some(hint));
        } else if has_identity && !has_issuer {
            let hint = "anybody may vouch for a name: say who must";
            problems.add(None, format!("{field}.issuer"), "is missing", Some(hint));
        }
        let twice = [(&self.identity, &self.identity_pattern), (&self.issuer, &self.issuer_pattern)];
        if twice.iter().any(|(exact, pattern)| exact.is_some() && pattern.is_some()) {
            problems.add(None, field, "is exact or a pattern, not both", None);
        }
        let needs_root = has_identity || self.log == Some(true);
        if needs_root && self.trusted_root.is_none() {
            problems.add(None, format!("{field}.trusted_root"), "is missing", Some("name a trusted_root.json"));
        }
        for (name, pattern) in [("identity_pattern", &self.identity_pattern), ("issuer_pattern", &self.issuer_pattern)]
        {
            if let Some(pattern) = pattern
                && let Err(message) = whole(pattern.get_ref())
            {
                let hint = "write ^ before and $ after it, and \\\\. for a dot";
                problems.add(pattern.span(), format!("{field}.{name}"), message, Some(hint));
            }
        }
    }

    fn lint(&self, field: &str, lints: &mut Vec<Lint>) {
        let mut add = |name: &str, message: &str| {
            lints.push(Lint { field: format!("{field}.{name}"), message: message.to_owned() });
        };
        for (name, pattern) in [("identity_pattern", &self.identity_pattern), ("issuer_pattern", &self.issuer_pattern)]
        {
            let Some(pattern) = pattern.as_ref().map(|pattern| pattern.get_ref().as_str()) else { continue };
            if has_bare_dot(pattern) {
                add(name, "an unescaped . matches any character: github.com matches githubXcom");
            }
            if pattern.contains(".*") || pattern.contains(".+") {
                add(name, "matches any rest: somebody may be able to choose a name that fits");
            }
        }
        if self.log == Some(false) && self.key.is_none() {
            add("log", "without a log nobody notices a signature made with a stolen identity");
        }
    }
}

/// A pattern as one that matches whole names only.
///
/// # Errors
/// Why it is none.
pub fn whole(pattern: &str) -> Result<Regex, String> {
    let inner = pattern.strip_prefix('^').and_then(|rest| rest.strip_suffix('$'));
    // "\$" at the end is a dollar sign, not an end.
    let is_anchored = inner.is_some_and(|inner| (inner.len() - inner.trim_end_matches('\\').len()) % 2 == 0);
    if !is_anchored {
        return Err("is not anchored: it would match a part of a longer name".to_owned());
    }
    if pattern.len() > PATTERN_BYTES_MAX {
        return Err(format!("is longer than {PATTERN_BYTES_MAX} bytes"));
    }
    // Alternatives at the top would each have one anchor only, so the whole is anchored once more.
    Regex::new(&format!("\\A(?:{pattern})\\z")).map_err(|error| error.to_string())
}

/// A dot that is neither escaped, nor in brackets, nor followed by a repetition.
fn has_bare_dot(pattern: &str) -> bool {
    let bytes = pattern.as_bytes();
    let (mut index, mut in_class) = (0, false);
    while index < bytes.len() {
        match bytes[index] {
            b'\\' => index += 1,
            b'[' => in_class = true,
            b']' => in_class = false,
            b'.' if !in_class && !matches!(bytes.get(index + 1), Some(b'*' | b'+' | b'?' | b'{')) => return true,
            _ => {}
        }
        index += 1;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
[[rule]]
apps = ["bank"]
threshold = 2
annotations = { env = "prod" }

[[rule.signers]]
key = "release.pub"

[[rule.signers]]
name = "ci"
identity_pattern = "^https://github\\.com/acme/bank/[a-z]+$"
issuer = "https://token.actions.githubusercontent.com"
trusted_root = "/etc/trusted_root.json"

[[rule.attestations]]
predicate_type = "https://slsa.dev/provenance/v1"
signers = [{ key = "builder.pub" }]
says = { "/runDetails/builder/id" = "https://builder.example" }

[[rule]]
repositories = ["acme/*"]
signers = [{ key = "release.pub" }]
"#;

    fn parse(text: &str) -> Result<Policy, Invalid> {
        Policy::parse(Path::new("/etc/selvage/policy.toml"), text)
    }

    #[test]
    fn paths_are_relative_to_the_file_and_the_first_rule_that_covers_decides() {
        let policy = parse(GOOD).unwrap();
        assert_eq!(policy.rules[0].signers[0].key.as_deref(), Some(Path::new("/etc/selvage/release.pub")));
        let rule = |app, repository| policy.rules.iter().position(|rule| rule.covers(app, repository));
        assert_eq!(rule("bank", "acme/bank"), Some(0));
        assert_eq!(rule("shop", "acme/shop"), Some(1));
        assert_eq!(rule("shop", "other/shop"), None);
        assert_eq!(policy.lints(), []);
    }

    #[test]
    fn a_rule_may_be_for_one_registry_and_repositories_are_called_as_there() {
        let text = "registries = ['ghcr', 'mirror/quay']\n\
                    [[rule]]\nregistry = 'ghcr'\nrepositories = ['acme/*']\nsigners = [{ key = 'a.pub' }]\n\
                    [[rule]]\nregistry = 'mirror/quay'\nsigners = [{ key = 'b.pub' }]\n\
                    [[rule]]\nregistry = 'own'\nrepositories = ['acme/*']\nsigners = [{ key = 'c.pub' }]\n\
                    [[rule]]\nrepositories = ['ghcr/other/*']\nsigners = [{ key = 'd.pub' }]\n";
        let policy = parse(text).unwrap();
        let rule = |repository| policy.rules.iter().position(|rule| rule.covers("shop", repository));
        for (repository, covered) in [
            ("ghcr/acme/shop", Some(0)),
            ("mirror/quay/any/thing", Some(1)),
            ("acme/shop", Some(2)),
            ("ghcr/other/shop", Some(3)),
            // Names that only begin like a registry's, or are one's whole, are none of its repositories.
            ("ghcrx/acme/shop", None),
            ("ghcr", None),
            ("mirror/acme/shop", None),
        ] {
            assert_eq!(rule(repository), covered, "{repository}");
        }
        assert_eq!(policy.lints(), []);
        let unused = parse(&text.replace("registry = 'ghcr'", "")).unwrap().lints();
        assert_eq!(unused[0].field, "registries[0]");
    }

    #[test]
    fn a_registry_that_nobody_named_or_that_lies_in_another_is_refused() {
        for (registries, registry, field, line) in [
            ("'ghcr'", "ghrc", "rule[0].registry", Some(3)),
            ("'ghcr'", "https://ghcr.io", "rule[0].registry", Some(3)),
            ("'own'", "own", "registries[0]", None),
            ("'ghcr', 'ghcr'", "ghcr", "registries[1]", None),
            ("'ghcr/a', 'ghcr'", "ghcr", "registries[0]", None),
        ] {
            let text = format!(
                "registries = [{registries}]\n[[rule]]\nregistry = '{registry}'\nsigners = [{{ key = 'a' }}]\n"
            );
            let places = parse(&text).unwrap_err().places();
            assert_eq!((places[0].field.as_str(), places[0].line), (field, line), "{registries} {registry}");
            assert_eq!(places.len(), 1, "{registries}");
        }
        let places = parse("registries = ['https://ghcr.io']\n").unwrap_err().places();
        assert_eq!(places[0].line, Some(1));
    }

    #[test]
    fn a_pattern_that_matches_a_part_of_a_name_is_refused_with_its_line() {
        for bad in ["https://github\\\\.com/acme", "^https://a", "a$", "^a\\\\$", ".*"] {
            let text = GOOD.replace("^https://github\\\\.com/acme/bank/[a-z]+$", bad);
            let places = parse(&text).unwrap_err().places();
            assert_eq!(
                (places[0].line, places[0].field.as_str()),
                (Some(12), "rule[0].signers[1].identity_pattern"),
                "{bad}"
            );
        }
        let alternatives = whole("^a|b$").unwrap();
        assert!(!alternatives.is_match("ax") && !alternatives.is_match("xb"));
        let look_alike = whole("^https://github\\.com/acme$").unwrap();
        assert!(
            !look_alike.is_match("https://github.com/acme/evil") && !look_alike.is_match("x\nhttps://github.com/acme")
        );
        assert!(whole("^($").is_err());
    }

    #[test]
    fn what_is_likely_not_meant_is_told() {
        let lax = GOOD.replace("github\\\\.com/acme/bank/[a-z]+", "github.com/.*").replace("apps = [\"bank\"]", "");
        let told: Vec<String> = parse(&lax).unwrap().lints().into_iter().map(|lint| lint.field).collect();
        assert_eq!(
            told,
            ["rule[0].signers[1].identity_pattern"; 2]
                .map(str::to_owned)
                .into_iter()
                .chain(["rule[1]".to_owned()])
                .collect::<Vec<_>>()
        );
        assert_eq!(parse("").unwrap().lints()[0].field, "rule");
    }

    #[test]
    fn a_rule_that_can_t_be_met_or_says_two_things_is_refused() {
        for (from, to, field) in [
            ("threshold = 2", "threshold = 3", "rule[0].threshold"),
            ("threshold = 2", "threshold = 0", "rule[0].threshold"),
            ("key = \"release.pub\"", "key = \"release.pub\"\nidentity = \"a\"", "rule[0].signers[0]"),
            ("issuer = \"https://token.actions.githubusercontent.com\"", "", "rule[0].signers[1].issuer"),
            ("trusted_root = \"/etc/trusted_root.json\"", "", "rule[0].signers[1].trusted_root"),
            ("https://slsa.dev/provenance/v1", PREDICATE_SIGN, "rule[0].attestations[0].predicate_type"),
            ("\"/runDetails/builder/id\"", "\"builder\"", "rule[0].attestations[0].says"),
            ("\"acme/*\"", "\"a*b\"", "rule[1].repositories"),
        ] {
            let places = parse(&GOOD.replacen(from, to, 1)).unwrap_err().places();
            assert_eq!(places[0].field, field, "{to}");
        }
    }
}
