//! `selvage node join`: from a token to a node's identity and configuration.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use miette::Report;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use selvage_certs::{Enrolment, Role, roots_of};
use selvage_config::join::{AUTHORITIES_PATH, CertificateAnswer, JOIN_PATH, JoinRequest, JoinToken};
use selvage_config::{Digest, NodeName};

use crate::client::{json, send};
use crate::output::{Output, failed, failure, wrong};

/// Longest time for one request.
const TIMEOUT: Duration = Duration::from_secs(30);

/// `selvage node join`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  selvage node join fra-1 --control-plane cp.example:7400 --token-file token --dir /etc/selvage\n\nThe node makes its key here and tells it to nobody. The token says by which authority the control plane is known."
)]
pub(crate) struct Arguments {
    /// The node's name.
    node: NodeName,

    /// `host:port` of the control plane.
    #[arg(long, value_name = "HOST:PORT")]
    control_plane: String,

    /// The token of `selvage nodes invite`.
    #[arg(long, env = "SELVAGE_JOIN_TOKEN", hide_env_values = true, required_unless_present = "token_file")]
    token: Option<String>,

    /// A file with the token.
    #[arg(long, conflicts_with = "token")]
    token_file: Option<PathBuf>,

    /// Where certificate, key, authorities and a first node.toml are written.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

/// Joins.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let token = token(&arguments)?;
    let base = format!("https://{}", arguments.control_plane);
    let roots = known_roots(&base, &token).await?;
    // The control plane is known by its role, whatever address it is reached at.
    let (_, port) =
        arguments.control_plane.rsplit_once(':').ok_or_else(|| wrong("--control-plane is host:port", None))?;
    let named = format!("https://{}:{port}", Role::ControlPlane.tls_name());
    let address = tokio::net::lookup_host(&arguments.control_plane).await;
    let address = address.map_err(|error| failure("look the control plane up", &error, None))?.next();
    let address = address.ok_or_else(|| failed("the control plane has no address", None))?;
    let builder = reqwest::Client::builder().use_preconfigured_tls(selvage_certs::client(&roots)).no_proxy();
    let builder = builder.resolve(&Role::ControlPlane.tls_name(), address).timeout(TIMEOUT);
    let client = builder.build().map_err(|error| failure("set up the HTTP client", &error, None))?;

    let enrolment = Enrolment::create().map_err(|error| failure("make a key", &error, None))?;
    let request = STANDARD.encode(enrolment.request());
    let document = JoinRequest { token, node: arguments.node.clone(), request };
    let answer: CertificateAnswer = json(client.post(format!("{named}{JOIN_PATH}")).json(&document), "join").await?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(answer.certificate.as_bytes()).collect();
    let chain = chain.map_err(|error| failure("read the certificate", &error, None))?;
    let identity = enrolment.finish(chain).map_err(|error| failure("use the certificate", &error, None))?;

    let dir = &arguments.dir;
    let made = std::fs::create_dir_all(dir).map_err(|error| failure(&format!("make {}", dir.display()), &error, None));
    made?;
    let mut files = crate::certs::save(&identity, dir, "node")?;
    files.push(written(&dir.join("ca.pem"), &answer.roots)?);
    let config = dir.join("node.toml");
    if !config.exists() {
        files.push(written(&config, &configuration(&arguments, &answer))?);
    }
    let text = files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join("\n");
    output.answer(&serde_json::json!({ "node": arguments.node, "region": answer.region, "files": files }), text);
    Ok(ExitCode::SUCCESS)
}

fn token(arguments: &Arguments) -> Result<JoinToken, Report> {
    let text = match (&arguments.token, &arguments.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).map_err(|error| wrong(format!("read {}: {error}", path.display()), None))?
        }
        (None, None) => return Err(wrong("give --token or --token-file", None)),
    };
    text.parse().map_err(|error| wrong(format!("{error}"), Some("`selvage nodes invite` makes one")))
}

/// The authorities that the control plane shows, if the one that the token names is among them. Nothing else is asked
/// before that is known, and nothing told.
async fn known_roots(base: &str, token: &JoinToken) -> Result<RootCertStore, Report> {
    let builder = reqwest::Client::builder().use_preconfigured_tls(unchecked::client()).no_proxy().timeout(TIMEOUT);
    let client = builder.build().map_err(|error| failure("set up the HTTP client", &error, None))?;
    let answer = send(client.get(format!("{base}{AUTHORITIES_PATH}")), "ask for the fleet's authorities").await?;
    let pem = answer.text().await.map_err(|error| failure("read the fleet's authorities", &error, None))?;
    let certificates: Vec<CertificateDer<'_>> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).filter_map(Result::ok).collect();
    let named = certificates.iter().find(|der| Digest::of(der) == token.authority);
    let hint = "somebody else answers there, or the token is of another fleet";
    let named = named.ok_or_else(|| failed("the control plane does not show the token's authority", Some(hint)))?;
    roots_of(std::slice::from_ref(named)).map_err(|error| failure("use the fleet's authority", &error, None))
}

fn written(path: &Path, text: &str) -> Result<PathBuf, Report> {
    std::fs::write(path, text).map_err(|error| failure(&format!("write {}", path.display()), &error, None))?;
    Ok(path.to_owned())
}

fn configuration(arguments: &Arguments, answer: &CertificateAnswer) -> String {
    format!(
        "name = \"{}\"\nregion = \"{}\"\nstate_dir = \"state\"\n\n[listen]\nhttp = \"127.0.0.1:8080\"\n\n\
         [identity]\ncertificate = \"node.pem\"\nkey = \"node.key\"\nroots = \"ca.pem\"\n\n\
         [control_plane]\naddress = \"{}\"\n\n\
         # Whose signatures count here. Nothing runs until a key is named.\n[trust]\nkeys = []\n# root = \"root-1.json\"\n",
        arguments.node, answer.region, arguments.control_plane
    )
}

/// A client that takes any certificate: what it is told is checked by hash.
mod unchecked {
    use std::sync::Arc;

    use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
    use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};

    #[derive(Debug)]
    struct Any;

    impl ServerCertVerifier for Any {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Err(Error::General("TLS 1.2 is not spoken here".into()))
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            selvage_certs::provider().signature_verification_algorithms.supported_schemes()
        }
    }

    pub(super) fn client() -> ClientConfig {
        let mut config = selvage_certs::client(&RootCertStore::empty());
        config.dangerous().set_certificate_verifier(Arc::new(Any));
        config
    }
}
