//! Pebble, the ACME authority for tests of Let's Encrypt, with its server of names. Both stay on loopback.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use selvage_certs::Authority;
use tokio::net::TcpStream;

use super::PATIENCE;
use super::window::Window;

/// A program for `dns-01` that puts records into the server of names.
const HOOK: &str = r#"set -eu
echo "$2 $3" >> "$1"
case $2 in
present) curl -sSf -d "{\"host\":\"$3.\",\"value\":\"$4\"}" NAMES/set-txt ;;
cleanup) curl -sSf -d "{\"host\":\"$3.\"}" NAMES/clear-txt ;;
esac
"#;

/// The two programs. They end with this.
pub(super) struct Pebble {
    dir: tempfile::TempDir,
    directory: u16,
    management: u16,
    names: u16,
    names_management: u16,
    children: Vec<Child>,
    /// Name and key of the one account that it knows from elsewhere. None: anybody may have one.
    external: Option<(String, String)>,
    /// Who says for it when to renew. None: nobody.
    window: Option<Window>,
}

impl Drop for Pebble {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("pebble.log")).unwrap_or_default();
            eprintln!("pebble said:\n{log}");
        }
    }
}

fn is_there(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| dir.join(name).is_file());
    assert!(found || std::env::var_os("CI").is_none(), "CI needs {name}: see .ci/tools");
    if !found {
        eprintln!("\n!!! SKIPPED: {name} is not installed; .ci/tools DIR installs it !!!\n");
    }
    found
}

/// A port that nobody listens on, below those that the system gives to whoever wants any: it stays free until it is used.
fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 100;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Pebble {
    /// An authority that is not running yet. None: it is not installed.
    pub(super) fn new() -> Option<Self> {
        if !["pebble", "pebble-challtestsrv", "curl"].into_iter().all(is_there) {
            return None;
        }
        let [directory, management, names, names_management] = std::array::from_fn(|_| free_port());
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create("directory").unwrap();
        fs::write(dir.path().join("roots.pem"), authority.certificate_pem()).unwrap();
        let own = authority.issue_server(&[], &["127.0.0.1".parse().unwrap()]).unwrap();
        own.save(dir.path().join("own.pem"), dir.path().join("own.key")).unwrap();
        Some(Self {
            dir,
            directory,
            management,
            names,
            names_management,
            children: Vec::new(),
            external: None,
            window: None,
        })
    }

    /// It gives accounts only to whom it knows by this name and this key, in base64url (RFC 8555 7.3.4).
    pub(super) fn knows_only(&mut self, name: &str, key: &str) {
        self.external = Some((name.to_owned(), key.to_owned()));
    }

    /// From now on its directory is one that also says when to renew.
    pub(super) async fn says_when(&mut self) -> Window {
        let window = Window::open(self.dir.path(), self.directory()).await;
        self.window.insert(window).clone()
    }

    /// Where its directory is.
    pub(super) fn directory(&self) -> String {
        let own = || format!("https://127.0.0.1:{}/dir", self.directory);
        self.window.as_ref().map_or_else(own, Window::directory)
    }

    /// What its directory is believed with.
    pub(super) fn roots(&self) -> PathBuf {
        self.dir.path().join("roots.pem")
    }

    /// A program that puts records, for `sh`. It notes its calls in the file that is its first argument.
    pub(super) fn hook(&self) -> PathBuf {
        let path = self.dir.path().join("hook.sh");
        fs::write(&path, HOOK.replace("NAMES", &format!("http://127.0.0.1:{}", self.names_management))).unwrap();
        path
    }

    /// Starts it. It looks for challenges at these ports of 127.0.0.1, whatever the name.
    pub(super) async fn start(&mut self, http: u16, https: u16) {
        if self.children.is_empty() {
            self.start_names().await;
        }
        let path = |name: &str| self.dir.path().join(name);
        let config = serde_json::json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{}", self.directory),
            "managementListenAddress": format!("127.0.0.1:{}", self.management),
            "certificate": path("own.pem"), "privateKey": path("own.key"),
            "httpPort": http, "tlsPort": https,
            "ocspResponderURL": "", "externalAccountBindingRequired": self.external.is_some(),
            "externalAccountMACKeys": self.external.iter().cloned().collect::<BTreeMap<_, _>>(),
            "retryAfter": { "authz": 1, "order": 1 },
        }});
        fs::write(path("config.json"), config.to_string()).unwrap();
        let at = |port: u16| format!("127.0.0.1:{port}");
        let mut pebble = Command::new("pebble");
        pebble.arg("-config").arg(path("config.json")).args(["-dnsserver", &at(self.names)]);
        // It looks at once, and at each order anew.
        pebble.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_AUTHZREUSE", "0");
        self.run(pebble, "pebble.log", &[self.directory, self.management]).await;
    }

    /// Starts what says where names lead, before the authority, which then finds them so from the first order on.
    pub(super) async fn start_names(&mut self) {
        let at = |port: u16| format!("127.0.0.1:{port}");
        let mut names = Command::new("pebble-challtestsrv");
        names.args(["-http01", "", "-https01", "", "-tlsalpn01", "", "-defaultIPv6", "", "-defaultIPv4", "127.0.0.1"]);
        names.args(["-dns01", &at(self.names), "-management", &at(self.names_management)]);
        self.run(names, "names.log", &[self.names_management]).await;
    }

    /// Runs a program until it listens at these ports.
    async fn run(&mut self, mut command: Command, log: &str, ports: &[u16]) {
        let log = fs::File::create(self.dir.path().join(log)).unwrap();
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.children.push(command.spawn().unwrap());
        for port in ports {
            let opening = async {
                while TcpStream::connect(("127.0.0.1", *port)).await.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(PATIENCE, opening).await.expect("pebble does not start");
        }
    }

    /// Has `name` lead to `address`.
    pub(super) async fn resolve(&self, name: &str, address: &str) {
        let body = format!("{{\"host\":\"{name}.\",\"addresses\":[\"{address}\"]}}");
        curl(&["-d", &body, &format!("http://127.0.0.1:{}/clear-a", self.names_management)]).await.unwrap();
        curl(&["-d", &body, &format!("http://127.0.0.1:{}/add-a", self.names_management)]).await.unwrap();
    }

    /// Who vouches for what it issues.
    pub(super) async fn issuer(&self) -> RootCertStore {
        let roots: &Path = &self.roots();
        let roots = roots.to_str().unwrap();
        let pem = curl(&["--cacert", roots, &format!("https://127.0.0.1:{}/roots/0", self.management)]).await.unwrap();
        let mut store = RootCertStore::empty();
        store.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
        store
    }
}

/// What a server answers, or why it does not.
pub(super) async fn curl(arguments: &[&str]) -> Result<Vec<u8>, String> {
    let output = tokio::process::Command::new("curl").args(["-sSf"]).args(arguments).output().await.unwrap();
    if output.status.success() { Ok(output.stdout) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}
