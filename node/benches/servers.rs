//! The programs that are measured: how they are started, and that they are what they should be.

pub(crate) mod hyper;
pub(crate) mod kinds;
pub(crate) mod tools;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use crate::aim::Aim;
use crate::figures::{BACKTRACES, without_backtraces};
use crate::process;

/// The core of every server.
const SERVER_CORE: &str = "0";
/// How long a server may take until it answers: a component of many megabytes is compiled first.
const START_MAX: Duration = Duration::from_secs(180);
/// Between two looks whether it answers.
const START_STEP: Duration = Duration::from_micros(200);
/// Longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What is asked of a server.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    pub(crate) path: &'static str,
    /// JSON to post. None: a GET.
    pub(crate) body: Option<&'static str>,
    /// What must be in the answer.
    pub(crate) answer: &'static str,
}

/// A program that serves, not started.
pub(crate) struct Server {
    pub(crate) name: String,
    /// Selvage's rate as a multiple of this server's.
    pub(crate) rate_aim: Option<Aim>,
    /// Selvage's p99 below saturation as a multiple of this server's.
    pub(crate) tail_aim: Option<Aim>,
    /// What it is started by, if not directly.
    wrapper: Vec<String>,
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    listen: Listen,
}

/// How a program is told where to listen.
enum Listen {
    /// The address after a flag.
    Flag(&'static str),
    /// The address after a flag and a name.
    Named(&'static str, &'static str),
    /// The port alone.
    Port,
    /// A file with `{address}` in it.
    File { path: PathBuf, text: String },
}

/// A program that serves. It ends when this is dropped.
pub(crate) struct Running {
    pub(crate) url: String,
    /// From the start of the program to its first answer.
    pub(crate) started_in: Duration,
    child: Child,
}

impl Server {
    fn new(name: &str, program: &Path, arguments: Vec<OsString>, listen: Listen) -> Self {
        let (name, program) = (name.to_owned(), program.to_owned());
        let (wrapper, environment) = (Vec::new(), Vec::new());
        Self { name, rate_aim: None, tail_aim: None, wrapper, program, arguments, environment, listen }
    }

    /// The same, started by another program that takes its place.
    pub(crate) fn wrapped(self, wrapper: &[&str]) -> Self {
        Self { wrapper: wrapper.iter().map(ToString::to_string).collect(), ..self }
    }

    /// Selvage shall answer at least so many times as many requests.
    pub(crate) fn aim(self, times: f64) -> Self {
        Self { rate_aim: Some(Aim::AtLeast(times)), ..self }
    }

    /// Selvage's p99 shall be at most so many times this server's.
    pub(crate) fn tail_aim(self, times: f64) -> Self {
        Self { tail_aim: Some(Aim::AtMost(times)), ..self }
    }

    /// Starts it on its core, waits until it answers, and makes sure that it runs without backtraces.
    pub(crate) fn start(&self, ask: &Ask) -> anyhow::Result<Running> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE]).args(&self.wrapper).arg(&self.program).args(&self.arguments);
        match &self.listen {
            Listen::Flag(flag) => drop(command.args([flag, address.to_string().as_str()])),
            Listen::Named(flag, name) => drop(command.arg(flag).arg(format!("{name}{address}"))),
            Listen::Port => drop(command.arg(address.port().to_string())),
            Listen::File { path, text } => std::fs::write(path, text.replace("{address}", &address.to_string()))?,
        }
        without_backtraces(&mut command).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let start = Instant::now();
        let child = command.spawn()?;
        let url = format!("http://{address}{}", ask.path);
        let mut running = Running { url, started_in: Duration::ZERO, child };
        while !answers(address, ask) {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended with {status} before it answered", self.name);
            }
            ensure!(start.elapsed() < START_MAX, "{} does not answer {} as it should", self.name, ask.path);
            std::thread::sleep(START_STEP);
        }
        running.started_in = start.elapsed();
        running.has_no_backtraces()?;
        Ok(running)
    }
}

impl Running {
    /// Where it is asked for another host, and where that is.
    pub(crate) fn url_at(&self, host: &str) -> anyhow::Result<(String, SocketAddr)> {
        let rest = self.url.strip_prefix("http://").context("no http")?;
        let (address, path) = rest.split_once('/').context("no path")?;
        let address: SocketAddr = address.parse()?;
        Ok((format!("http://{host}:{}/{path}", address.port()), address))
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// CPU time that it has used. None of these programs has children.
    pub(crate) fn cpu(&self) -> anyhow::Result<Duration> {
        process::cpu(self.pid())
    }

    fn has_no_backtraces(&self) -> anyhow::Result<()> {
        let environment = std::fs::read(format!("/proc/{}/environ", self.child.id()))?;
        let mut set = environment.split(|byte| *byte == 0);
        let wanted = |line: &[u8]| BACKTRACES.iter().any(|name| line.starts_with(name.as_bytes()));
        ensure!(!set.any(wanted), "a server runs with RUST_BACKTRACE: its figures would be of backtraces");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answers(address: SocketAddr, ask: &Ask) -> bool {
    let call = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        let (path, method) = (ask.path, if ask.body.is_some() { "POST" } else { "GET" });
        let body = ask.body.unwrap_or_default();
        let fields = match ask.body {
            Some(body) => format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()),
            None => String::new(),
        };
        write!(stream, "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n{fields}\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer.starts_with("HTTP/1.1 200") && answer.contains(ask.answer))
    };
    call().unwrap_or(false)
}
