//! The demo's apps: the examples, built in, and two hostile ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use miette::Report;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use selvage_config::bundle::Bundle;
use selvage_config::key::pem;
use selvage_control_plane::answers::{Released, RolloutState};
use serde_json::json;

use super::fleet::Fleet;
use crate::deploy::{publish as push_and_sign, release, rollout_until};
use crate::key::write_new;
use crate::output::{Output, failed, failure};
use crate::token::TokenKey;

/// Who issues the demo's tokens.
pub(super) const ISSUER: &str = "https://issuer.example";
/// The issuer's key.
pub(super) const KID: &str = "es256";
/// How long nodes may take to serve a release: the first one is compiled on each.
const ROLLOUT: Duration = Duration::from_secs(120);

/// An example: its files, as they are in the tree.
struct Example {
    name: &'static str,
    files: &'static [(&'static str, &'static [u8])],
}

const EXAMPLES: [Example; 4] = [
    Example {
        name: "hello",
        files: &[
            ("spin.toml", include_bytes!("../../../examples/hello/spin.toml")),
            ("hello.wasm", include_bytes!("../../../examples/hello/hello.wasm")),
        ],
    },
    Example {
        name: "hello-p3",
        files: &[
            ("spin.toml", include_bytes!("../../../examples/hello-p3/spin.toml")),
            ("hello-p3.wasm", include_bytes!("../../../examples/hello-p3/hello-p3.wasm")),
        ],
    },
    Example {
        name: "counter",
        files: &[
            ("spin.toml", include_bytes!("../../../examples/counter/spin.toml")),
            ("counter.wasm", include_bytes!("../../../examples/counter/counter.wasm")),
        ],
    },
    Example {
        name: "gate",
        files: &[
            ("spin.toml", include_bytes!("../../../examples/gate/spin.toml")),
            ("gate.wasm", include_bytes!("../../../examples/gate/gate.wasm")),
        ],
    },
];

/// Hostile guests, as component text: one burns CPU for ever, one takes memory until it gets no more.
const HOSTILE: [(&str, &str); 2] = [
    ("burn", include_str!("../../../node/tests/guests/burn.wat")),
    ("hog", include_str!("../../../node/tests/guests/hog.wat")),
];

/// Prepares, signs, pushes and releases the examples, and waits until every node serves them.
pub(super) async fn publish(fleet: &Fleet, examples: Option<&Path>, output: Output) -> Result<(), Report> {
    let mut released = Vec::new();
    for example in &EXAMPLES {
        let directory = fleet.apps().join(example.name);
        prepare(example, &directory, examples)?;
        if example.name == "gate" {
            make_issuer(&directory)?;
        }
        released.push(deploy(fleet, &directory, output).await?);
    }
    for released in &released {
        served(fleet, released).await?;
        output.progress(format_args!("every node serves {}", released.release.id));
    }
    Ok(())
}

/// Signs, pushes and releases the app in `directory`.
pub(super) async fn deploy(fleet: &Fleet, directory: &Path, output: Output) -> Result<Released, Report> {
    let bundle = Bundle::load(directory)?;
    output.progress(format_args!("signing and pushing {}", bundle.app.name));
    let reference = push_and_sign(fleet.client(), &bundle, fleet.signing_key(), output.quiet()).await?;
    release(fleet.client(), &bundle.app.name, &reference, [].into()).await
}

/// Waits until every node serves the release.
pub(super) async fn served(fleet: &Fleet, released: &Released) -> Result<(), Report> {
    let nodes = fleet.nodes().count();
    let until = Instant::now() + ROLLOUT;
    let settled = rollout_until(fleet.client(), released, until, |r| r.serving >= nodes || r.refused > 0).await?;
    if settled.serving >= nodes {
        return Ok(());
    }
    let refused = settled.nodes.iter().find_map(|node| match &node.state {
        RolloutState::Refused { cause, reason } => Some(format!("{} refused it ({cause}): {reason}", node.node)),
        _ => None,
    });
    let reason = refused.unwrap_or_else(|| format!("{} of {nodes} nodes serve it", settled.serving));
    Err(failed(format!("{}: {reason}", released.release.id), None))
}

fn prepare(example: &Example, directory: &Path, examples: Option<&Path>) -> Result<(), Report> {
    fs::create_dir_all(directory).map_err(|error| failure("make an app's directory", &error, None))?;
    for (name, built_in) in example.files {
        let path = directory.join(name);
        let other = examples.map(|dir| dir.join(example.name).join(name)).filter(|path| path.exists());
        let content = match other {
            Some(other) => fs::read(&other).map_err(|e| failure(&format!("read {}", other.display()), &e, None))?,
            None => built_in.to_vec(),
        };
        fs::write(&path, content).map_err(|e| failure(&format!("write {}", path.display()), &e, None))?;
    }
    Ok(())
}

/// The issuer's key, made at the first start, and its public half where the manifest expects it.
fn make_issuer(directory: &Path) -> Result<(), Report> {
    let path = directory.join("es256.pem");
    if !path.exists() {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new());
        let pkcs8 = pkcs8.map_err(|_| failed("the system has no random numbers", None))?;
        write_new(&path, pem("PRIVATE KEY", pkcs8.as_ref()).as_bytes(), 0o600)?;
    }
    let text = fs::read_to_string(&path).map_err(|error| failure("read the issuer's key", &error, None))?;
    let key = TokenKey::of_pem(&text).ok_or_else(|| failed("the issuer's key can't be used", None))?;
    let set = json!({ "keys": [key.jwk(KID)] }).to_string();
    fs::write(directory.join("jwks.json"), set).map_err(|error| failure("write the issuer's key", &error, None))
}

/// Writes a hostile app with tight limits; returns its directory.
pub(super) fn hostile(fleet: &Fleet, name: &str) -> Result<PathBuf, Report> {
    let text = HOSTILE.iter().find(|(known, _)| *known == name).map(|(_, text)| *text);
    let text = text.ok_or_else(|| failed(format!("no hostile app is named {name}"), None))?;
    let wasm = wat::parse_str(text).map_err(|error| failure("assemble a guest", &error, None))?;
    let directory = fleet.apps().join(name);
    let manifest = format!(
        "spin_manifest_version = 2\n[application]\nname = \"{name}\"\n[[trigger.http]]\nroute = \"/...\"\n\
         component = \"{name}\"\n[component.{name}]\nsource = \"{name}.wasm\"\n\
         [component.{name}.tool.selvage]\nlimits = {{ cpu_ms = 100, memory_bytes = 16777216 }}\n"
    );
    let written = fs::create_dir_all(&directory)
        .and_then(|()| fs::write(directory.join("spin.toml"), manifest))
        .and_then(|()| fs::write(directory.join(format!("{name}.wasm")), wasm));
    written.map_err(|error| failure("write a hostile app", &error, None))?;
    Ok(directory)
}
