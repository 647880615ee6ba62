//! A control plane on a free port, an authority that it trusts, and clients of every kind.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;

use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use rustls::{ClientConfig, RootCertStore};
use selvage_certs::{Authority, Role, client, mutual_client, roots_of};
use selvage_config::Digest;
use selvage_config::app::App;
use selvage_config::control_plane::{ControlPlaneConfig, Operator, OperatorRole, PlanSigning, RegistryConfig};
use selvage_config::node::IdentityFiles;
use selvage_config::oci::{APP_CONFIG, Descriptor, MANIFEST, Manifest, WASM};
use selvage_config::plan::{AppStatus, Status};
use selvage_control_plane::ControlPlane;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The token of operator `ops`.
pub(crate) const TOKEN: &str = "a token: with a colon";

pub(crate) struct World {
    pub(crate) authority: Authority,
    pub(crate) directory: TempDir,
    control_plane: Option<ControlPlane>,
    url: String,
    /// How it signs plans, from the next start on.
    pub(crate) plans: Option<PlanSigning>,
    change: fn(&mut ControlPlaneConfig, &Path),
    /// The name of its state directory, from the next start on.
    pub(crate) state: &'static str,
}

/// Somebody who asks.
#[derive(Clone)]
pub(crate) struct Asker {
    client: Client,
    url: String,
    token: Option<String>,
}

impl World {
    pub(crate) async fn start() -> Self {
        Self::start_with(|_, _| {}).await
    }

    /// The same with another configuration: `change` is told the directory too, at every start.
    pub(crate) async fn start_with(change: fn(&mut ControlPlaneConfig, &Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create(&directory.path().join("ca")).unwrap();
        let identity = authority.issue_identity(&Role::ControlPlane, &[IpAddr::V4(Ipv4Addr::LOCALHOST)], &[]).unwrap();
        identity.save(directory.path().join("c.pem"), directory.path().join("k.pem")).unwrap();
        std::fs::write(directory.path().join("roots.pem"), authority.certificate_pem()).unwrap();
        let mut world =
            Self { authority, directory, control_plane: None, url: String::new(), plans: None, change, state: "state" };
        world.resume().await;
        world
    }

    pub(crate) fn config(&self) -> ControlPlaneConfig {
        let path = |name: &str| self.directory.path().join(name);
        ControlPlaneConfig {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            state_dir: path(self.state),
            identity: IdentityFiles { certificate: path("c.pem"), key: path("k.pem"), roots: path("roots.pem") },
            plans: self.plans.clone(),
            operators: [("ops", Some(Digest::of(TOKEN.as_bytes()))), ("ada", None)]
                .map(|(name, token_digest)| Operator {
                    name: name.into(),
                    token_digest,
                    role: OperatorRole::Admin,
                    apps: None,
                })
                .into(),
            authority: None,
            sealing_key: None,
            registry: RegistryConfig::default(),
            nats: None,
            stores: Default::default(),
            placements: Default::default(),
        }
    }

    pub(crate) async fn resume(&mut self) {
        let mut config = self.config();
        (self.change)(&mut config, self.directory.path());
        let control_plane = ControlPlane::start(config).await.unwrap();
        self.url = format!("https://{}", control_plane.address());
        self.control_plane = Some(control_plane);
    }

    pub(crate) async fn stop(&mut self) {
        self.control_plane.take().unwrap().stop().await;
    }

    pub(crate) async fn restart(&mut self) {
        self.stop().await;
        self.resume().await;
    }

    pub(crate) fn roots(&self) -> RootCertStore {
        roots_of(&[self.authority.certificate_der()]).unwrap()
    }

    pub(crate) fn asker(&self, mut tls: ClientConfig, token: Option<&str>) -> Asker {
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let client = Client::builder().use_preconfigured_tls(tls).no_proxy().build().unwrap();
        Asker { client, url: self.url.clone(), token: token.map(str::to_owned) }
    }

    pub(crate) fn stranger(&self) -> Asker {
        self.asker(client(&self.roots()), None)
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Whoever shows this token.
    pub(crate) fn by_token(&self, token: &str) -> Asker {
        self.asker(client(&self.roots()), Some(token))
    }

    /// An operator by token.
    pub(crate) fn ops(&self) -> Asker {
        self.asker(client(&self.roots()), Some(TOKEN))
    }

    pub(crate) fn by_certificate(&self, role: &Role) -> Asker {
        let identity = self.authority.issue_identity(role, &[], &[]).unwrap();
        let tls = mutual_client(&identity, &self.roots()).unwrap();
        self.asker(Arc::unwrap_or_clone(tls), None)
    }

    pub(crate) fn node(&self, name: &str) -> Asker {
        self.by_certificate(&Role::Node { region: "fra".parse().unwrap(), node: name.parse().unwrap() })
    }

    pub(crate) fn audit(&self) -> String {
        std::fs::read_to_string(self.directory.path().join(self.state).join("audit.jsonl")).unwrap()
    }
}

impl Asker {
    /// The same, asking somebody else.
    pub(crate) fn at(&self, url: &str) -> Self {
        Self { url: url.to_owned(), ..self.clone() }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn ask(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.url));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path).send().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.ask(Method::POST, path).json(body).send().await.unwrap()
    }

    pub(crate) async fn delete(&self, path: &str) -> Response {
        self.ask(Method::DELETE, path).send().await.unwrap()
    }

    pub(crate) async fn push_blob(&self, repository: &str, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        let path = format!("/v2/{repository}/blobs/uploads/?digest={digest}");
        let answer = self.ask(Method::POST, &path).body(bytes.to_vec()).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::CREATED, "{}", answer.text().await.unwrap());
        digest
    }

    pub(crate) async fn put_manifest(&self, repository: &str, reference: &str, manifest: &Manifest) -> Response {
        let bytes = serde_json::to_vec(manifest).unwrap();
        let request = self.ask(Method::PUT, &format!("/v2/{repository}/manifests/{reference}"));
        request.header("content-type", MANIFEST).body(bytes).send().await.unwrap()
    }

    /// Pushes an app under a tag, and answers its manifest's digest.
    pub(crate) async fn push_app(&self, repository: &str, tag: &str, app: &App) -> Digest {
        let document = app.to_json();
        self.push_blob(repository, &document).await;
        let code = code_of(app.name.as_str());
        self.push_blob(repository, &code).await;
        let manifest = manifest(Descriptor::of(APP_CONFIG, &document), vec![Descriptor::of(WASM, &code)]);
        let answer = self.put_manifest(repository, tag, &manifest).await;
        assert_eq!(answer.status(), StatusCode::CREATED, "{}", answer.text().await.unwrap());
        Digest::of(&serde_json::to_vec(&manifest).unwrap())
    }

    pub(crate) async fn release(&self, app: &str, reference: &str) -> Response {
        self.post(
            &format!("/api/v1/apps/{app}/releases"),
            &json!({ "repository": format!("apps/{app}"), "reference": reference }),
        )
        .await
    }

    pub(crate) async fn tell(&self, status: &Status) -> Response {
        let path = format!("/api/v1/nodes/{}", status.node);
        self.ask(Method::PUT, &path).json(status).send().await.unwrap()
    }
}

fn code_of(name: &str) -> Vec<u8> {
    format!("the code of {name}").into_bytes()
}

/// An app whose content differs by `version`.
pub(crate) fn app(name: &str, version: &str, hosts: &[&str]) -> App {
    let mut app = App::of_component(name.parse().unwrap(), "main".parse().unwrap(), Digest::of(&code_of(name)));
    app.version = Some(version.to_owned());
    app.hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
    app
}

pub(crate) fn manifest(config: Descriptor, layers: Vec<Descriptor>) -> Manifest {
    Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: None,
        config,
        layers,
        subject: None,
        annotations: [].into(),
    }
}

pub(crate) fn status(node: &str, generation: u64, port: Option<u16>, apps: Vec<AppStatus>) -> Status {
    Status {
        node: node.parse().unwrap(),
        region: "fra".parse().unwrap(),
        version: "1".into(),
        generation,
        replication: port.map(|port| (Ipv4Addr::LOCALHOST, port).into()),
        front: None,
        admin: None,
        apps,
        plan: None,
        load: Vec::new(),
        labels: [].into(),
    }
}

/// The answer's JSON, which must come with this status.
pub(crate) async fn json_of(answer: Response, status: StatusCode) -> Value {
    let actual = answer.status();
    let text = answer.text().await.unwrap();
    assert_eq!(actual, status, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The code of an OCI error.
pub(crate) async fn refusal(answer: Response, status: StatusCode) -> String {
    json_of(answer, status).await["errors"][0]["code"].as_str().unwrap().to_owned()
}
