//! `selvage root`: the document that says which key signs a fleet's plans. People sign it, each with a key of their own
//! that never comes near a machine of the fleet.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Subcommand;
use miette::Report;
use selvage_config::root::Root;
use selvage_config::signature::Envelope;
use selvage_config::{KeyId, PublicKey};

use crate::key::{PasswordArguments, SigningKey, public_key, write_new};
use crate::output::{Output, failure, wrong};

/// A day, milliseconds.
const DAY_MS: u64 = 86_400_000;

/// `selvage root`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples (each person with a key pair of `selvage key`; the plans' is of `selvage key --plain`):\n  selvage root init --namespace acme --key alice.pub --key bob.pub --key carol.pub --threshold 2 --plan-key plan.pub\n  selvage root sign root-1.json --key alice.key      alice, then bob: on machines of their own\n  selvage root show root-1.json                      who signed; exit code 1 while it is not enough\n  selvage root rotate root-1.json --plan-key new.pub --out root-2.json\n\nNodes have the first root in their file ([trust] root), the control plane all of them ([plans] roots): nodes follow."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    act: Act,
}

#[derive(Debug, Subcommand)]
enum Act {
    /// Make the first root, unsigned.
    Init {
        /// The fleet's name. Plans of another fleet are nothing to its nodes.
        #[arg(long)]
        namespace: String,
        /// A public key whose owner signs roots. May be repeated.
        #[arg(long = "key", required = true, value_name = "FILE")]
        keys: Vec<PathBuf>,
        /// How many of them must sign a root.
        #[arg(long, default_value_t = 2)]
        threshold: usize,
        /// The public key of the control plane that signs plans. May be repeated.
        #[arg(long = "plan-key", required = true, value_name = "FILE")]
        plan_keys: Vec<PathBuf>,
        /// For how long it holds, days. After that nodes complain, and go on.
        #[arg(long, default_value_t = 365)]
        days: u64,
        /// Where it is written.
        #[arg(long, default_value = "root-1.json", value_name = "FILE")]
        out: PathBuf,
    },
    /// Add one's signature to a root.
    Sign {
        /// The root.
        root: PathBuf,
        /// One's private key.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        #[command(flatten)]
        password: PasswordArguments,
    },
    /// Make the root that follows one, unsigned: with other keys, or with more time.
    Rotate {
        /// The newest root.
        root: PathBuf,
        /// A public key whose owner signs roots from now on. May be repeated.
        #[arg(long, value_name = "FILE")]
        add_key: Vec<PathBuf>,
        /// A public key whose owner signs no more. May be repeated.
        #[arg(long, value_name = "FILE")]
        remove_key: Vec<PathBuf>,
        /// How many must sign. Default: as before.
        #[arg(long)]
        threshold: Option<usize>,
        /// The public keys that sign plans, in place of those before. May be repeated. Default: as before.
        #[arg(long = "plan-key", value_name = "FILE")]
        plan_keys: Vec<PathBuf>,
        /// For how long it holds, days.
        #[arg(long, default_value_t = 365)]
        days: u64,
        /// Where it is written.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Show a root, who signed it, and whether that is enough.
    Show {
        /// The root.
        root: PathBuf,
        /// The root before it: its keys must have signed too.
        #[arg(long, value_name = "FILE")]
        after: Option<PathBuf>,
    },
}

/// How a root is signed, and how long it holds.
pub(crate) struct RootTerms {
    /// Days.
    pub(crate) days: u64,
    /// How many keys must sign.
    pub(crate) threshold: usize,
}

/// Makes, signs or shows a root.
pub(crate) fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    match arguments.act {
        Act::Init { namespace, keys, threshold, plan_keys, days, out } => {
            let terms = RootTerms { days, threshold };
            let envelope = first_root(namespace, read_keys(&keys)?, read_keys(&plan_keys)?, &terms)?;
            save_root(&out, &envelope)?;
            told(&out, &envelope, None, output)?;
            Ok(ExitCode::SUCCESS)
        }
        Act::Sign { root, key, password } => {
            let key = SigningKey::load(&key, &password.password)?;
            let mut envelope = load_root(&root)?;
            let document = unverified(&root, &envelope)?;
            // A key of the root before signs too: which one that is can't be seen from here, so any key may.
            envelope.sign(key.private()).map_err(|error| failure("sign the root", &error, None))?;
            replace(&root, &envelope)?;
            if !document.keys.contains(&key.private().public()) {
                output.progress("this key is none of the root's own: it counts only if it is one of the root before");
            }
            told(&root, &envelope, None, output)?;
            Ok(ExitCode::SUCCESS)
        }
        Act::Rotate { root, add_key, remove_key, threshold, plan_keys, days, out } => {
            let before = unverified(&root, &load_root(&root)?)?;
            let removed = read_keys(&remove_key)?;
            if let Some(index) = removed.iter().position(|key| !before.keys.contains(key)) {
                return Err(wrong(format!("{} is none of the root's keys", remove_key[index].display()), None));
            }
            let mut keys: Vec<PublicKey> = before.keys.iter().filter(|key| !removed.contains(key)).cloned().collect();
            keys.extend(read_keys(&add_key)?);
            let plan_keys = if plan_keys.is_empty() { before.plan_keys } else { read_keys(&plan_keys)? };
            let issued_ms = now_ms();
            let next = Root {
                namespace: before.namespace,
                version: before.version + 1,
                issued_ms,
                expires_ms: issued_ms.saturating_add(days.saturating_mul(DAY_MS)),
                threshold: threshold.unwrap_or(before.threshold),
                keys,
                plan_keys,
            };
            let envelope = next.envelope().map_err(|error| wrong(error.to_string(), None))?;
            save_root(&out, &envelope)?;
            told(&out, &envelope, None, output)?;
            Ok(ExitCode::SUCCESS)
        }
        Act::Show { root, after } => {
            let before = after.map(|path| unverified(&path, &load_root(&path)?)).transpose()?;
            let enough = told(&root, &load_root(&root)?, before.as_ref(), output)?;
            Ok(if enough { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// The first root of a fleet, unsigned.
pub(crate) fn first_root(
    namespace: String,
    keys: Vec<PublicKey>,
    plan_keys: Vec<PublicKey>,
    terms: &RootTerms,
) -> Result<Envelope, Report> {
    let issued_ms = now_ms();
    let expires_ms = issued_ms.saturating_add(terms.days.saturating_mul(DAY_MS));
    let root = Root { issued_ms, expires_ms, threshold: terms.threshold, ..Root::initial(namespace, keys, plan_keys) };
    root.envelope().map_err(|error| wrong(error.to_string(), Some("see `selvage root --help`")))
}

/// Writes a root that is not there yet.
pub(crate) fn save_root(path: &Path, envelope: &Envelope) -> Result<(), Report> {
    write_new(path, &json(envelope)?, 0o644)
}

fn json(envelope: &Envelope) -> Result<Vec<u8>, Report> {
    serde_json::to_vec_pretty(envelope).map_err(|error| failure("write the root", &error, None))
}

/// Writes a root in place of itself, whole.
fn replace(path: &Path, envelope: &Envelope) -> Result<(), Report> {
    let failed = |error: std::io::Error| failure(&format!("write {}", path.display()), &error, None);
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    std::fs::write(file.path(), json(envelope)?).map_err(failed)?;
    let permissions = std::fs::metadata(path).map_err(failed)?.permissions();
    std::fs::set_permissions(file.path(), permissions).map_err(failed)?;
    file.persist(path).map(drop).map_err(|error| failed(error.error))
}

fn load_root(path: &Path) -> Result<Envelope, Report> {
    let name = path.display();
    let bytes = std::fs::read(path).map_err(|error| failure(&format!("read {name}"), &error, None))?;
    serde_json::from_slice(&bytes).map_err(|error| wrong(format!("{name} is no root: {error}"), None))
}

fn unverified(path: &Path, envelope: &Envelope) -> Result<Root, Report> {
    Root::unverified(envelope).map_err(|error| failure(&format!("use {}", path.display()), &error, None))
}

fn read_keys(paths: &[PathBuf]) -> Result<Vec<PublicKey>, Report> {
    paths.iter().map(|path| public_key(path)).collect()
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Tells what a root says and who signed it. Whether that is enough.
fn told(path: &Path, envelope: &Envelope, before: Option<&Root>, output: Output) -> Result<bool, Report> {
    let root = unverified(path, envelope)?;
    let signers = root.signers(envelope);
    let checked = before.map_or_else(|| Root::first(envelope), |before| before.next(envelope));
    let wrong = checked.err().map(|error| error.to_string());
    let line = |key: &PublicKey| {
        let signed = if signers.contains(&key.id()) { "signed" } else { "-" };
        format!("  {}  {signed}", key.id())
    };
    let keys: Vec<String> = root.keys.iter().map(line).collect();
    let plan_keys: Vec<KeyId> = root.plan_keys.iter().map(PublicKey::id).collect();
    let plans: Vec<String> = plan_keys.iter().map(|key| format!("  {key}")).collect();
    let state = wrong.clone().unwrap_or_else(|| "complete".to_owned());
    let text = format!(
        "{}: root {} of {}, {} of {} keys must sign: {state}\nkeys\n{}\nkeys of plans\n{}",
        path.display(),
        root.version,
        root.namespace,
        root.threshold,
        root.keys.len(),
        keys.join("\n"),
        plans.join("\n"),
    );
    let answer = serde_json::json!({
        "file": path, "namespace": root.namespace, "version": root.version, "expires_ms": root.expires_ms,
        "threshold": root.threshold, "keys": root.keys.iter().map(PublicKey::id).collect::<Vec<_>>(),
        "plan_keys": plan_keys, "signers": signers, "complete": wrong.is_none(), "lacks": wrong,
    });
    output.answer(&answer, text);
    Ok(wrong.is_none())
}
