//! A whole node that starts again with thousands of apps on its disk, all signed, and no control plane.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use selvage_config::app::App;
use selvage_config::node::NodeConfig;
use selvage_config::oci::{self, Descriptor};
use selvage_config::plan::Plan;
use selvage_config::release::Release;
use selvage_config::signature::{
    Bundle, Envelope, EnvelopeSignature, PAYLOAD_TYPE, Statement, pre_authentication_encoding,
};
use selvage_config::{AppName, Digest};
use selvage_node::Node;
use selvage_node::release::fetch::Fetched;
use selvage_node::release::state::State;

use crate::apps::{self, Template};
use crate::figures::say;
use crate::process::{Resident, resident};
use crate::{READY_MS, RESIDENT_KIB, millis};

/// Threads that write what the node will find. Each file is synced: alone it would take minutes.
const WRITERS: usize = 16;

/// Leaves in `dir` what a node with these apps has on its disk. Its compiled code is in `compiled`.
pub(crate) fn prepare(dir: &Path, compiled: &Path, template: &Template, components: u32) -> anyhow::Result<()> {
    let signer = Signer::new()?;
    std::fs::write(dir.join("cosign.pub"), signer.pem())?;
    let state = State::open(&dir.join("state"))?;
    symlink(compiled, dir.join("state/compiled"))?;
    let numbers: Vec<u32> = (0..components).collect();
    let share = numbers.len().div_ceil(WRITERS);
    let one = |number: &u32| deploy(&state, &signer, template, *number);
    let some = |numbers: &[u32]| numbers.iter().map(one).collect::<anyhow::Result<Vec<_>>>();
    let written = std::thread::scope(|scope| {
        let writers: Vec<_> = numbers.chunks(share).map(|numbers| scope.spawn(move || some(numbers))).collect();
        let written = writers.into_iter().map(|writer| writer.join().expect("no writer panics"));
        written.collect::<anyhow::Result<Vec<_>>>()
    })?;
    let serving: BTreeMap<AppName, Release> = written.into_iter().flatten().collect();
    let releases = serving.values().cloned().collect();
    state.keep_plan(&Plan::new("node".parse()?, 1, releases, Vec::new()))?;
    Ok(state.keep_serving(&serving)?)
}

/// Puts one app and its signature on the disk.
fn deploy(state: &State, signer: &Signer, template: &Template, number: u32) -> anyhow::Result<(AppName, Release)> {
    let name: AppName = apps::name(number as usize).parse()?;
    let code = template.code(number);
    let digest = Digest::of(&code);
    let app = App::of_component(name.clone(), "guest".parse()?, digest);
    let fetched = Fetched::of_files(&app, [(digest, code)].into());
    let manifest = fetched.head.expected;
    let bundle = signer.bundle(manifest)?;
    for bytes in fetched.blobs.values().chain([&fetched.head.manifest]) {
        state.keep_blob(bytes)?;
    }
    state.keep_blob(&bundle)?;
    state.keep_signatures(manifest, &[Descriptor::of(oci::BUNDLE, &bundle)])?;
    let release = Release {
        id: format!("{name}@1").parse()?,
        repository: "bench/app".parse()?,
        manifest,
        variables: BTreeMap::new(),
        created_ms: 1,
        created_by: "bench".into(),
    };
    Ok((name, release))
}

/// Starts the node.
pub(crate) async fn start(dir: &Path, components: usize) -> anyhow::Result<()> {
    let text = r#"
name = "node"
region = "here"
state_dir = "state"
listen = { http = "127.0.0.1:0" }
trust = { keys = ["cosign.pub"] }
"#;
    let config = NodeConfig::parse(&dir.join("node.toml"), text).map_err(|error| anyhow::anyhow!("{error:?}"))?;
    let empty = resident()?;
    let start = Instant::now();
    let node = Box::pin(Node::start(config)).await?;
    let took = millis(start.elapsed());
    let serving = node.status().apps.iter().filter(|app| app.serving.is_some()).count();
    ensure!(serving == components, "{serving} of {components} apps serve");
    let Resident { kib, .. } = resident()?;
    let each = (kib - empty.kib) / components as f64;
    say(format_args!(
        "  a whole node that starts with them on its disk, signed: ready in {took:.0} ms  {}; resident {each:.0} KiB \
         each, the node in it  {}",
        READY_MS.judge(took, " ms"),
        RESIDENT_KIB.judge(each, " KiB")
    ));
    node.drain().await;
    Ok(())
}

/// Who signs, with a key of the bench.
struct Signer(EcdsaKeyPair);

impl Signer {
    fn new() -> anyhow::Result<Self> {
        let random = SystemRandom::new();
        let made = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random);
        let pkcs8 = made.ok().context("no key")?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random);
        Ok(Self(pair.ok().context("no key pair")?))
    }

    fn spki(&self) -> Vec<u8> {
        // A P-256 key up to its point (RFC 5480 2).
        let mut spki = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08".to_vec();
        spki.extend_from_slice(b"\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00");
        spki.extend_from_slice(self.0.public_key().as_ref());
        spki
    }

    fn pem(&self) -> String {
        format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(self.spki()))
    }

    fn bundle(&self, manifest: Digest) -> anyhow::Result<Vec<u8>> {
        let payload = serde_json::to_vec(&Statement::signature_of(manifest))?;
        let covered = pre_authentication_encoding(PAYLOAD_TYPE, &payload);
        let signed = self.0.sign(&SystemRandom::new(), &covered).ok().context("no signature")?;
        let signatures = vec![EnvelopeSignature { sig: signed.as_ref().to_vec(), keyid: String::new() }];
        let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.into(), signatures };
        Ok(serde_json::to_vec(&Bundle::of_key(&self.spki(), envelope))?)
    }
}
