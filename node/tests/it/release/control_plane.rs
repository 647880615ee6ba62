//! A control plane of the test: a registry and plans over mTLS, on loopback, that may lie.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use selvage_certs::{Authority, ClientAuth, Role, mutual_server, peer_of, roots_of};
use selvage_config::Digest;
use selvage_config::oci::{self, Descriptor, Index, Manifest};
use selvage_config::plan::{Plan, Status, StatusDelta};
use selvage_config::signature::{
    Bundle, Envelope, EnvelopeSignature, PAYLOAD_TYPE, Statement, pre_authentication_encoding,
};
use selvage_node::release::fetch::Fetched;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// Long for anything here, short for whoever waits for a test that hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A cosign key pair.
pub(crate) struct Signer(EcdsaKeyPair);

impl Signer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap())
    }

    fn spki(&self) -> Vec<u8> {
        // A P-256 key up to its point (RFC 5480 2).
        let mut spki = b"\x30\x59\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08".to_vec();
        spki.extend_from_slice(b"\x2a\x86\x48\xce\x3d\x03\x01\x07\x03\x42\x00");
        spki.extend_from_slice(self.0.public_key().as_ref());
        spki
    }

    pub(crate) fn pem(&self) -> String {
        use base64::Engine as _;
        let text = base64::engine::general_purpose::STANDARD.encode(self.spki());
        format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
    }

    pub(crate) fn bundle(&self, digest: Digest) -> Bytes {
        let payload = serde_json::to_vec(&Statement::signature_of(digest)).unwrap();
        let covered = pre_authentication_encoding(PAYLOAD_TYPE, &payload);
        let sig = self.0.sign(&SystemRandom::new(), &covered).unwrap().as_ref().to_vec();
        let signatures = vec![EnvelopeSignature { sig, keyid: String::new() }];
        let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.into(), signatures };
        serde_json::to_vec(&Bundle::of_key(&self.spki(), envelope)).unwrap().into()
    }
}

/// Referrers in one answer.
const REFERRERS_AT_ONCE: usize = 2;

/// What it has.
#[derive(Default)]
struct Shelf {
    manifests: BTreeMap<String, Bytes>,
    blobs: BTreeMap<Digest, Bytes>,
    referrers: BTreeMap<Digest, Vec<Descriptor>>,
    asked: Vec<String>,
    /// What is answered to other questions, by path.
    documents: BTreeMap<String, Bytes>,
    /// How often a node told what changed.
    deltas: usize,
    /// The plan is answered whatever generation the node has.
    lies: bool,
}

/// A running control plane.
pub(crate) struct ControlPlane {
    pub(crate) address: SocketAddr,
    shelf: Arc<Mutex<Shelf>>,
    plans: watch::Sender<Option<Plan>>,
    statuses: watch::Receiver<Option<Status>>,
    told: watch::Sender<Option<Status>>,
    _task: JoinSet<()>,
}

#[derive(Clone)]
struct Parts {
    shelf: Arc<Mutex<Shelf>>,
    plans: watch::Sender<Option<Plan>>,
    statuses: watch::Sender<Option<Status>>,
}

impl ControlPlane {
    pub(crate) async fn start(authority: &Authority) -> Self {
        let identity = authority.issue_identity(&Role::ControlPlane, &[], &[]).unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let acceptor = TlsAcceptor::from(mutual_server(&identity, &roots, ClientAuth::Required).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let statuses = watch::Sender::new(None);
        let heard = statuses.subscribe();
        let parts = Parts { shelf: Arc::default(), plans: watch::Sender::new(None), statuses };
        let (shelf, plans, told) = (Arc::clone(&parts.shelf), parts.plans.clone(), parts.statuses.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(converse(acceptor.clone(), stream, parts.clone()));
            }
        });
        Self { address, shelf, plans, statuses: heard, told, _task: task }
    }

    /// Puts a release's bytes on the shelf.
    pub(crate) fn publish(&self, fetched: &Fetched) -> Digest {
        let mut shelf = self.shelf.lock().unwrap();
        let digest = fetched.head.expected;
        shelf.manifests.insert(digest.to_string(), fetched.head.manifest.clone());
        shelf.blobs.extend(fetched.blobs.clone());
        digest
    }

    /// Signs what lies there, as an artifact that refers to it. `by_tag`: as registries without referrers have it.
    pub(crate) fn sign(&self, digest: Digest, signer: &Signer, by_tag: bool) {
        let mut shelf = self.shelf.lock().unwrap();
        let bundle = signer.bundle(digest);
        let subject = Descriptor::of(oci::MANIFEST, &shelf.manifests[&digest.to_string()]);
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(oci::MANIFEST.into()),
            artifact_type: Some(oci::BUNDLE.into()),
            config: Descriptor::of(oci::EMPTY, b"{}"),
            layers: vec![Descriptor::of(oci::BUNDLE, &bundle)],
            subject: Some(subject),
            annotations: BTreeMap::new(),
        };
        let manifest = Bytes::from(serde_json::to_vec(&manifest).unwrap());
        let mut referrer = Descriptor::of(oci::MANIFEST, &manifest);
        // What real clients write there.
        referrer.artifact_type = Some(oci::EMPTY.into());
        shelf.manifests.insert(referrer.digest.to_string(), manifest);
        shelf.blobs.insert(Digest::of(&bundle), bundle);
        if by_tag {
            let index = Index { schema_version: 2, media_type: Some(oci::INDEX.into()), manifests: vec![referrer] };
            let index = serde_json::to_vec(&index).unwrap().into();
            shelf.manifests.insert(format!("sha256-{}", digest.hex()), index);
        } else {
            shelf.referrers.entry(digest).or_default().push(referrer);
        }
    }

    /// Nothing refers to anything any more.
    pub(crate) fn forget_signatures(&self) {
        self.shelf.lock().unwrap().referrers.clear();
    }

    /// Changes one byte of a blob or manifest, under its old name.
    pub(crate) fn tamper(&self, digest: Digest) {
        let mut shelf = self.shelf.lock().unwrap();
        let flip = |bytes: &mut Bytes| {
            let mut changed = bytes.to_vec();
            *changed.last_mut().unwrap() ^= 1;
            *bytes = changed.into();
        };
        if let Some(blob) = shelf.blobs.get_mut(&digest) {
            flip(blob);
        }
        if let Some(manifest) = shelf.manifests.get_mut(&digest.to_string()) {
            flip(manifest);
        }
    }

    /// What is answered at a path from now on.
    pub(crate) fn document(&self, path: &str, document: &impl serde::Serialize) {
        let bytes = serde_json::to_vec(document).unwrap().into();
        self.shelf.lock().unwrap().documents.insert(path.to_owned(), bytes);
    }

    /// Says what shall run, also to a node that knows better.
    pub(crate) fn lie(&self, plan: Plan) {
        self.shelf.lock().unwrap().lies = true;
        self.plan(plan);
    }

    /// Says what shall run.
    pub(crate) fn plan(&self, plan: Plan) {
        self.plans.send_replace(Some(plan));
    }

    /// Paths that were asked for and contain `text`.
    pub(crate) fn asked(&self, text: &str) -> usize {
        self.shelf.lock().unwrap().asked.iter().filter(|path| path.contains(text)).count()
    }

    /// How often a node told what changed in its status, in place of all of it.
    pub(crate) fn deltas(&self) -> usize {
        self.shelf.lock().unwrap().deltas
    }

    /// What nodes told is another thing from now on than they know.
    pub(crate) fn mistake(&self, change: impl FnOnce(&mut Status)) {
        self.told.send_modify(|status| change(status.as_mut().unwrap()));
    }

    /// The first status from now on that is `right`.
    pub(crate) async fn status(&self, right: impl Fn(&Status) -> bool) -> Status {
        let mut statuses = self.statuses.clone();
        let heard = statuses.wait_for(|status| status.as_ref().is_some_and(&right));
        match tokio::time::timeout(PATIENCE, heard).await {
            Ok(status) => status.unwrap().clone().unwrap(),
            Err(_) => panic!("last status: {:?}", *self.statuses.borrow()),
        }
    }
}

async fn converse(acceptor: TlsAcceptor, stream: TcpStream, parts: Parts) {
    let Ok(stream) = acceptor.accept(stream).await else { return };
    let peer = peer_of(stream.get_ref().1.peer_certificates()).unwrap();
    assert!(matches!(peer, Some(Role::Node { .. })), "{peer:?}");
    let service = service_fn(move |request| {
        let parts = parts.clone();
        async move { Ok::<_, std::convert::Infallible>(answer(request, &parts).await) }
    });
    // A node that is gone ends the connection somehow.
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(request: http::Request<Incoming>, parts: &Parts) -> http::Response<Full<Bytes>> {
    let path = request.uri().path().to_owned();
    parts.shelf.lock().unwrap().asked.push(path.clone());
    let steps: Vec<&str> = path.split('/').skip(1).collect();
    let found = match *steps {
        ["api", "v1", "plans", _] => {
            let query = request.uri().query().unwrap_or_default();
            let after = query.split('&').find_map(|pair| pair.strip_prefix("after=")).unwrap().parse().unwrap();
            return newer_plan(parts, after).await;
        }
        ["api", "v1", "nodes", _] => {
            let is_delta = request.method() == http::Method::PATCH;
            let body = request.into_body().collect().await.unwrap().to_bytes();
            let status = if is_delta {
                let known = parts.statuses.borrow().clone().unwrap();
                let delta: StatusDelta = serde_json::from_slice(&body).unwrap();
                parts.shelf.lock().unwrap().deltas += 1;
                let Ok(status) = known.with(delta, known.digest()) else { return refusal() };
                status
            } else {
                serde_json::from_slice(&body).unwrap()
            };
            parts.statuses.send_replace(Some(status));
            Some(Bytes::new())
        }
        ["v2", .., "manifests", reference] => parts.shelf.lock().unwrap().manifests.get(reference).cloned(),
        ["v2", .., "blobs", digest] => parts.shelf.lock().unwrap().blobs.get(&digest.parse().unwrap()).cloned(),
        ["v2", .., "referrers", digest] => {
            let Some(all) = parts.shelf.lock().unwrap().referrers.get(&digest.parse().unwrap()).cloned() else {
                return none();
            };
            let last = request.uri().query().and_then(|query| query.strip_prefix("last="));
            let start = last.map_or(0, |last| last.parse().unwrap());
            return page(&path, &all, start);
        }
        _ => parts.shelf.lock().unwrap().documents.get(&path).cloned(),
    };
    found.map_or_else(none, |found| http::Response::new(Full::new(found)))
}

/// The whole status is to be told.
fn refusal() -> http::Response<Full<Bytes>> {
    let mut response = none();
    *response.status_mut() = http::StatusCode::PRECONDITION_FAILED;
    response
}

fn none() -> http::Response<Full<Bytes>> {
    let mut response = http::Response::new(Full::default());
    *response.status_mut() = http::StatusCode::NOT_FOUND;
    response
}

/// A page of a list of referrers, and where the next one is.
fn page(path: &str, all: &[Descriptor], start: usize) -> http::Response<Full<Bytes>> {
    let end = all.len().min(start + REFERRERS_AT_ONCE);
    let (media_type, manifests) = (Some(oci::INDEX.into()), all[start..end].to_vec());
    let index = serde_json::to_vec(&Index { schema_version: 2, media_type, manifests }).unwrap();
    let mut response = http::Response::new(Full::new(index.into()));
    if end < all.len() {
        let link = format!("<{path}?last={end}>; rel=\"next\"");
        response.headers_mut().insert("link", link.parse().unwrap());
    }
    response
}

async fn newer_plan(parts: &Parts, after: u64) -> http::Response<Full<Bytes>> {
    let mut plans = parts.plans.subscribe();
    let lies = || parts.shelf.lock().unwrap().lies;
    let newer = plans.wait_for(|plan| plan.as_ref().is_some_and(|plan| plan.generation > after || lies()));
    let plan = newer.await.unwrap().clone().unwrap();
    http::Response::new(Full::new(serde_json::to_vec(&plan).unwrap().into()))
}

/// Writes what `selvage` would: identity, roots and trusted key.
pub(crate) fn write_identity(authority: &Authority, dir: &Path, signer: &Signer) {
    let role = Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() };
    let identity = authority.issue_identity(&role, &[], &[]).unwrap();
    identity.save(dir.join("node.pem"), dir.join("node.key")).unwrap();
    std::fs::write(dir.join("ca.pem"), authority.certificate_pem()).unwrap();
    std::fs::write(dir.join("cosign.pub"), signer.pem()).unwrap();
}
