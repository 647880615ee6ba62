//! The demo's fleet: one control plane and three nodes, each with its own files, identity and sockets.
//!
//! They are configured by files like any other node, and share nothing but the process.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use miette::Report;
use selvage_certs::{Authority, Role};
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_config::node::NodeConfig;
use selvage_config::{NodeName, PrivateKey, Region};
use selvage_control_plane::ControlPlane;
use selvage_node::node::Node;
use serde_json::json;

use crate::certs::save;
use crate::client::Client;
use crate::context::Context;
use crate::key::{SigningKey, write_new};
use crate::output::{Output, failed, failure};
use crate::root::{RootTerms, first_root, save_root};

/// Where the demo's nodes stand.
const REGIONS: [&str; 3] = ["fra", "iad", "sin"];
/// Who the demo's commands are.
const OPERATOR: &str = "demo";
/// Names that the front's certificate is good for: a client such as curl takes no wildcard right below `localhost`.
const NAMES: [&str; 8] = [
    "localhost",
    "hello.localhost",
    "hello-p3.localhost",
    "counter.localhost",
    "gate.localhost",
    "gate.example",
    "burn.localhost",
    "hog.localhost",
];
/// How many ports are tried for a front.
const PORTS_TRIED: u16 = 1_000;
/// For how long the demo's root holds, days.
const DAYS: u64 = 365;
const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A running fleet.
pub(super) struct Fleet {
    directory: PathBuf,
    control_plane: Option<ControlPlane>,
    control_plane_address: SocketAddr,
    nodes: Vec<FleetNode>,
    client: Client,
    signing_key: SigningKey,
}

/// One node of the fleet. Its sockets keep their numbers over a restart.
pub(super) struct FleetNode {
    pub(super) name: NodeName,
    pub(super) region: Region,
    config: PathBuf,
    front: SocketAddr,
    running: Option<Node>,
}

impl FleetNode {
    /// Where its front listens.
    pub(super) fn front(&self) -> SocketAddr {
        self.front
    }
}

fn written(path: &Path, text: &str) -> Result<(), Report> {
    fs::write(path, text).map_err(|error| failure(&format!("write {}", path.display()), &error, None))
}

/// The key that signs: the one of an earlier start, since what it signed is still on the nodes' disks.
fn signing_key(certs: &Path) -> Result<SigningKey, Report> {
    let path = certs.join("cosign.key");
    if path.exists() {
        return SigningKey::load(&path, "");
    }
    let key = SigningKey::generate()?;
    write_new(&path, key.to_pem("")?.as_bytes(), 0o600)?;
    Ok(key)
}

/// The root of the fleet's plans and the key that it names. A real fleet's root has several keys, none of them on a
/// machine that runs; this one's are thrown away once they have signed.
fn plan_signing(certs: &Path) -> Result<(), Report> {
    let (root, key) = (certs.join("root-1.json"), certs.join("plan.key"));
    if root.exists() && key.exists() {
        return Ok(());
    }
    let failed = |error| failure("make the root of the plans", &error as &selvage_config::key::KeyError, None);
    let offline = [PrivateKey::generate().map_err(failed)?, PrivateKey::generate().map_err(failed)?];
    let plan = PrivateKey::generate().map_err(failed)?;
    let terms = RootTerms { days: DAYS, threshold: offline.len() };
    let keys = offline.iter().map(PrivateKey::public).collect();
    let mut envelope = first_root("demo".to_owned(), keys, vec![plan.public()], &terms)?;
    for key in &offline {
        envelope.sign(key).map_err(failed)?;
    }
    write_new(&key, plan.to_pem().as_bytes(), 0o600)?;
    save_root(&root, &envelope)
}

impl Fleet {
    /// Starts everything below `directory`. Nodes run what their disks hold; nothing on a first start.
    pub(super) async fn start(directory: &Path, port: u16, output: Output) -> Result<Self, Report> {
        let certs = directory.join("certs");
        fs::create_dir_all(&certs).map_err(|error| failure("make the demo's directory", &error, None))?;
        output.progress("making the authority, identities and a signing key");
        let authority = Authority::open_or_create(&certs).map_err(|e| failure("make the authority", &e, None))?;
        let issue = |role: &Role, stem: &str| {
            let identity = authority.issue_identity(role, &[LOCAL], &["localhost".to_owned()]);
            save(&identity.map_err(|error| failure("issue an identity", &error, None))?, &certs, stem)
        };
        issue(&Role::ControlPlane, "control-plane")?;
        let operator = OPERATOR
            .parse()
            .map_err(|error| failure("name the operator", &error as &selvage_certs::OperatorNameError, None))?;
        let operator = authority.issue_identity(&Role::Operator { name: operator }, &[], &[]);
        save(&operator.map_err(|error| failure("issue an identity", &error, None))?, &certs, "operator")?;
        let server = authority.issue_server(&NAMES.map(str::to_owned), &[LOCAL]);
        save(&server.map_err(|error| failure("issue a certificate", &error, None))?, &certs, "front")?;
        let signing_key = signing_key(&certs)?;
        written(&certs.join("cosign.pub"), &signing_key.public_pem())?;
        plan_signing(&certs)?;

        output.progress("starting the control plane");
        let control_plane = start_control_plane(directory, SocketAddr::new(LOCAL, 0)).await?;
        let control_plane_address = control_plane.address();
        let context = Context {
            control_plane: vec![format!("https://{control_plane_address}")].into(),
            roots: "certs/ca.pem".into(),
            certificate: Some("certs/operator.pem".into()),
            key: Some("certs/operator.key".into()),
            token_file: None,
        };
        context.save(&directory.join("context.toml"))?;
        let mut fleet = Self {
            client: Client::of(&directory.join("context.toml"))?,
            directory: directory.to_owned(),
            control_plane: Some(control_plane),
            control_plane_address,
            nodes: Vec::new(),
            signing_key,
        };
        let mut next = port;
        for region in REGIONS {
            let role = Role::Node { region: parsed(region)?, node: parsed(&format!("{region}-1"))? };
            issue(&role, &format!("node-{region}-1"))?;
            let front = free_front(next)?;
            next = front.port().saturating_add(1);
            let node = fleet.add_node(region, front).await?;
            output.progress(format_args!("started {} in {}, front https://{}", node.name, node.region, node.front));
        }
        Ok(fleet)
    }

    async fn add_node(&mut self, region: &str, front: SocketAddr) -> Result<&FleetNode, Report> {
        let directory = self.directory.join(format!("{region}-1"));
        fs::create_dir_all(&directory).map_err(|error| failure("make a node's directory", &error, None))?;
        let config = directory.join("node.toml");
        let control_plane = self.control_plane_address;
        let text = format!(
            "name = \"{region}-1\"\nregion = \"{region}\"\nstate_dir = \"state\"\ndrain_ms = 5000\n\n\
             [listen]\nhttps = \"{front}\"\nreplication = \"{replication}\"\nadmin = \"127.0.0.1:0\"\n\n\
             [[certificates]]\ncertificate = \"../certs/front.pem\"\nkey = \"../certs/front.key\"\n\n\
             [identity]\ncertificate = \"../certs/node-{region}-1.pem\"\nkey = \"../certs/node-{region}-1.key\"\n\
             roots = \"../certs/ca.pem\"\n\n\
             [control_plane]\naddress = \"{control_plane}\"\n\n[trust]\nkeys = [\"../certs/cosign.pub\"]\n\
             root = \"../certs/root-1.json\"\n",
            replication = free_udp()?,
        );
        written(&config, &text)?;
        let running = start_node(&config).await?;
        let (name, region) = (parsed(&format!("{region}-1"))?, parsed(region)?);
        self.nodes.push(FleetNode { name, region, config, front, running: Some(running) });
        self.nodes.last().ok_or_else(|| failed("no node", None))
    }

    /// The nodes.
    pub(super) fn nodes(&self) -> impl Iterator<Item = &FleetNode> {
        self.nodes.iter()
    }

    /// The node in `region`.
    pub(super) fn node(&self, region: &str) -> Result<&FleetNode, Report> {
        let found = self.nodes.iter().find(|node| node.region.as_str() == region);
        found.ok_or_else(|| failed(format!("no node stands in {region}"), None))
    }

    /// A client with the operator's certificate.
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// What signs releases that the nodes accept.
    pub(super) fn signing_key(&self) -> &SigningKey {
        &self.signing_key
    }

    /// Where certificates lie.
    pub(super) fn certs(&self) -> PathBuf {
        self.directory.join("certs")
    }

    /// Where apps are prepared.
    pub(super) fn apps(&self) -> PathBuf {
        self.directory.join("apps")
    }

    /// The private key of the demo's token issuer.
    pub(super) fn token_key(&self) -> PathBuf {
        self.directory.join("apps/gate/es256.pem")
    }

    /// The context file.
    pub(super) fn context(&self) -> PathBuf {
        self.directory.join("context.toml")
    }

    /// Where the registry keeps a blob: the tour damages one there.
    pub(super) fn registry_blob(&self, digest: selvage_config::Digest) -> PathBuf {
        self.directory.join("control-plane/state/blobs/sha256").join(digest.hex())
    }

    /// Where the control plane listens.
    pub(super) fn control_plane_address(&self) -> SocketAddr {
        self.control_plane_address
    }

    /// The fleet for programs.
    pub(super) fn description(&self) -> serde_json::Value {
        let nodes = self.nodes.iter().map(|n| json!({ "node": n.name, "region": n.region, "front": n.front }));
        json!({
            "control_plane": format!("https://{}", self.control_plane_address),
            "nodes": nodes.collect::<Vec<_>>(),
            "ca": self.certs().join("ca.pem"),
            "context": self.context(),
        })
    }

    /// Stops the control plane. Nodes go on.
    pub(super) async fn stop_control_plane(&mut self) {
        if let Some(control_plane) = self.control_plane.take() {
            control_plane.stop().await;
        }
    }

    /// Starts the control plane again, where it was.
    pub(super) async fn start_control_plane(&mut self) -> Result<(), Report> {
        self.control_plane = Some(start_control_plane(&self.directory, self.control_plane_address).await?);
        Ok(())
    }

    /// Stops the node in `region` and starts it again from its disk.
    pub(super) async fn restart(&mut self, region: &str) -> Result<(), Report> {
        let node = self.nodes.iter_mut().find(|node| node.region.as_str() == region);
        let node = node.ok_or_else(|| failed(format!("no node stands in {region}"), None))?;
        if let Some(running) = node.running.take() {
            running.drain().await;
        }
        node.running = Some(start_node(&node.config).await?);
        Ok(())
    }

    /// Stops everything, nodes first.
    pub(super) async fn stop(&mut self) {
        for node in &mut self.nodes {
            if let Some(running) = node.running.take() {
                running.drain().await;
            }
        }
        self.stop_control_plane().await;
    }
}

async fn start_control_plane(directory: &Path, listen: SocketAddr) -> Result<ControlPlane, Report> {
    let own = directory.join("control-plane");
    fs::create_dir_all(&own).map_err(|error| failure("make the control plane's directory", &error, None))?;
    let path = own.join("control-plane.toml");
    let text = format!(
        "listen = \"{listen}\"\nstate_dir = \"state\"\n\n[identity]\ncertificate = \"../certs/control-plane.pem\"\n\
         key = \"../certs/control-plane.key\"\nroots = \"../certs/ca.pem\"\n\n\
         [[operators]]\nname = \"{OPERATOR}\"\n\n\
         [plans]\nkey = \"../certs/plan.key\"\nroots = [\"../certs/root-1.json\"]\n\n\
         [stores.\"orders/default\"]\nhome = \"fra-1\"\n\n\
         [placements.atlantic]\nregions = [\"fra\", \"iad\"]\n\n\
         [stores.\"carts/default\"]\nplacement = \"atlantic\"\n"
    );
    written(&path, &text)?;
    let config = ControlPlaneConfig::parse(&path, &text)?;
    ControlPlane::start(config).await.map_err(|error| failure("start the control plane", &error, None))
}

async fn start_node(path: &Path) -> Result<Node, Report> {
    let text = fs::read_to_string(path).map_err(|e| failure(&format!("read {}", path.display()), &e, None))?;
    let config = NodeConfig::parse(path, &text)?;
    Node::start(config).await.map_err(|error| failure("start a node", &error, None))
}

fn parsed<T: std::str::FromStr<Err = selvage_config::id::NameError>>(text: &str) -> Result<T, Report> {
    text.parse().map_err(|error: selvage_config::id::NameError| failure("name a node", &error, None))
}

/// An address whose port is free for TCP and UDP: HTTP/3 answers on the same number.
fn free_front(from: u16) -> Result<SocketAddr, Report> {
    let candidates = (0..PORTS_TRIED).filter_map(|step| Some(SocketAddr::new(LOCAL, from.checked_add(step)?)));
    let mut free = candidates.filter(|address| TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok());
    free.next().ok_or_else(|| failed(format!("no port from {from} on is free"), Some("choose another --port")))
}

/// An address that is free for UDP. It is fixed in the node's file, so that peers find the node after a restart.
fn free_udp() -> Result<SocketAddr, Report> {
    let bound = UdpSocket::bind(SocketAddr::new(LOCAL, 0)).and_then(|socket| socket.local_addr());
    bound.map_err(|error| failure("find a free port", &error, None))
}
