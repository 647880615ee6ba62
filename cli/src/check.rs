//! `selvage check`: everything that can be found wrong without starting anything.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use miette::Report;
use selvage_certs::{FileError, FrontSecret, Identity, IssuedFiles, NameRules, roots_from_pem};
use selvage_config::bundle::Bundle;
use selvage_config::node::NodeConfig;
use selvage_config::policy::{Lint, Policy};

use crate::output::{Output, failure, wrong};
use crate::up::CacheArguments;
use crate::{control_plane, node};

const DAY_SECONDS: u64 = 86_400;
/// Bits of a file's mode that say who may run it.
const EXECUTABLE: u32 = 0o111;

/// `selvage check`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage check spin.toml            the manifest, its files, and what each component imports\n  selvage check /etc/selvage/node.toml     with its policy\n  selvage check /etc/selvage/policy.toml   what is likely not meant, too; exit code 1 if there is any"
)]
pub(crate) struct Arguments {
    /// A spin.toml, a .wasm file, a node's or a control plane's configuration, or a policy.
    #[arg(default_value = "spin.toml")]
    path: PathBuf,

    #[command(flatten)]
    cache: CacheArguments,
}

/// What kind of document a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    App,
    Node,
    ControlPlane,
    Policy,
}

/// Checks one document.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let path = &arguments.path;
    let kind = kind(path)?;
    let what = match kind {
        Kind::App => app(path, &arguments.cache).await?,
        Kind::Policy => {
            let (rules, lints) = policy(path)?;
            return Ok(judged(output, path, &format!("policy with {rules} rules"), (path, &lints)));
        }
        Kind::Node => {
            let config = node::load(path)?;
            let what = format!("node {} in {}{}{}", config.name, config.region, front(&config)?, backends(&config)?);
            let Some(own) = &config.trust.policy else { return Ok(judged(output, path, &what, (path, &[]))) };
            let (rules, lints) = policy(own)?;
            return Ok(judged(output, path, &format!("{what}\npolicy with {rules} rules"), (own, &lints)));
        }
        Kind::ControlPlane => format!("control plane at {}", control_plane::load(path)?.listen),
    };
    output.answer(&serde_json::json!({ "file": path, "ok": true, "what": what }), format_args!("ok: {what}"));
    Ok(ExitCode::SUCCESS)
}

/// Checks a policy with its keys and trust roots. Answers how many rules it has, and what is likely not meant.
fn policy(path: &Path) -> Result<(usize, Vec<Lint>), Report> {
    let text = std::fs::read_to_string(path).map_err(|error| failure("read the policy", &error, None))?;
    let document = Policy::parse(path, &text)?;
    selvage_node::release::verify::Policy::load(path).map_err(|error| failure("use the policy", &error, None))?;
    Ok((document.rules.len(), document.lints()))
}

/// Tells what a document is, and what in its policy is likely not meant: that alone makes it no good.
fn judged(output: Output, path: &Path, what: &str, (policy, lints): (&Path, &[Lint])) -> ExitCode {
    let told = lints.iter().map(|lint| format!("\n{}: {}: {}", policy.display(), lint.field, lint.message));
    let text = format!("{}: {what}{}", if lints.is_empty() { "ok" } else { "look at" }, told.collect::<String>());
    let answer = serde_json::json!({ "file": path, "ok": lints.is_empty(), "what": what, "lints": lints });
    output.answer(&answer, text);
    if lints.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The files of the front, read as a start would, and when its certificates end.
fn front(config: &NodeConfig) -> Result<String, Report> {
    let failed = |error: &FileError| failure("read the front's files", error, None);
    if let Some(path) = &config.tls.secret {
        FrontSecret::load(path).map_err(|error| failed(&error))?;
    }
    NameRules::load(&config.tls.names).map_err(|error| failed(&error))?;
    let mut told = String::new();
    for files in &config.certificates {
        let identity = Identity::load(&files.certificate, &files.key).map_err(|error| failed(&error))?;
        let name = identity.names().first().map_or("an address", String::as_str);
        // RFC 5280 4.1.2.5: after that moment it is not valid.
        let Ok(left) = identity.not_after().duration_since(SystemTime::now()) else {
            let message = format!("certificate {} of {name} has expired", files.certificate.display());
            return Err(wrong(message, Some("renew it")));
        };
        told += &format!("\ncertificate of {name} ends in {} days", left.as_secs() / DAY_SECONDS);
    }
    Ok(told + &acme(config)?)
}

/// The backends of its stores, and their files read as a start would. Nothing is connected to.
fn backends(config: &NodeConfig) -> Result<String, Report> {
    selvage_backend::check(&config.kv).map_err(|error| failure("read the files of a backend", &error, None))?;
    let mut told = String::new();
    for (name, backend) in &config.kv.backends {
        let own = config.kv.stores.keys().filter(|store| config.kv.backend_of(store) == Some(name)).count();
        let rest = if config.kv.backend.as_ref() == Some(name) { ", and every store without a rule" } else { "" };
        told += &format!("\nbackend {name}: {}, {own} stores by name{rest}", backend.kind.as_str());
    }
    Ok(told)
}

/// What certificates are got with, looked at as a start would, and when those that were got end.
fn acme(config: &NodeConfig) -> Result<String, Report> {
    let Some(acme) = &config.acme else { return Ok(String::new()) };
    let failed = |error: &FileError| failure("read the files of [acme]", error, None);
    if let Some(roots) = &acme.roots {
        roots_from_pem(roots).map_err(|error| failed(&error))?;
    }
    if let Some((program, _)) = acme.dns_hook() {
        let mode = std::fs::metadata(program).map(|found| if found.is_file() { found.permissions().mode() } else { 0 });
        if mode.is_ok_and(|mode| mode & EXECUTABLE == 0) || !program.exists() {
            let message = format!("acme.dns_hook: {} is no program", program.display());
            return Err(wrong(message, Some("name one by its path, with its arguments after it")));
        }
    }
    if let Some(external) = &acme.external_account
        && let Err(error) = std::fs::read(&external.key)
    {
        return Err(wrong(format!("acme.external_account.key: read {}: {error}", external.key.display()), None));
    }
    let files = IssuedFiles::at(&config.state_dir, acme.directory());
    let mut names = files.names().map_err(|error| failed(&error))?;
    names.extend(acme.names().filter(|name| !names.contains(name)).cloned().collect::<Vec<_>>());
    let mut told = format!("\ncertificates from {} by {}", acme.directory(), acme.challenge().as_str());
    for name in names {
        let left = files.load(&name).map_err(|error| failed(&error))?;
        let left = left.map(|identity| identity.not_after().duration_since(SystemTime::now()));
        told += &match left {
            None => format!("\ncertificate of {name} is not there yet"),
            // The node is about to get another one, or tells why not.
            Some(Err(_)) => format!("\ncertificate of {name} has expired"),
            Some(Ok(left)) => format!("\ncertificate of {name} ends in {} days", left.as_secs() / DAY_SECONDS),
        };
    }
    Ok(told)
}

async fn app(path: &Path, cache: &CacheArguments) -> Result<String, Report> {
    let bundle = Bundle::load(path)?;
    let app = bundle.app.clone();
    let checked = selvage_node::node::check(bundle, cache.directory()).await;
    checked.map_err(|error| failure("check the components", &error, None))?;
    Ok(format!("app {}, {} routes, {} components", app.name, app.routes.len(), app.components.len()))
}

fn kind(path: &Path) -> Result<Kind, Report> {
    if path.is_dir() || path.extension().is_some_and(|extension| extension == "wasm") {
        return Ok(Kind::App);
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong(format!("read {}: {error}", path.display()), Some("give the file to check")))?;
    Ok(kind_of(&text))
}

/// A key that only one kind of document has decides, also where the rest can't be parsed.
fn kind_of(text: &str) -> Kind {
    let has = |key: &str| {
        text.lines()
            .any(|line| line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('=')))
    };
    if text.lines().any(|line| line.trim_start().starts_with("[[rule]]")) {
        Kind::Policy
    } else if has("region") {
        Kind::Node
    } else if has("state_dir") && !has("spin_manifest_version") {
        Kind::ControlPlane
    } else {
        Kind::App
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_a_document_shows_in_its_keys() {
        assert_eq!(kind_of("spin_manifest_version = 2"), Kind::App);
        assert_eq!(kind_of("name = 'a'\nregion='fra'\nstate_dir = 's'"), Kind::Node);
        assert_eq!(kind_of("[[rule]]\napps = ['a']"), Kind::Policy);
        assert_eq!(kind_of("listen = 'x'\nstate_dir = 's'"), Kind::ControlPlane);
    }
}
