//! A node with several apps, as a process of its own: who is watched, who floods, and who computes.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use selvage_config::Limits;
use selvage_config::app::isolation::{Isolation, Reuse};
use selvage_node::listen::{ListenOptions, Listeners};
use selvage_node::route::Table;

use crate::apps::{self, Template};

/// The argument that makes the bench this node.
pub(crate) const ARGUMENT: &str = "--node";
/// The host by which the node is asked whether it is there.
const LOOPBACK: &str = "127.0.0.1";
/// Requests of one app at once: more than any client here has connections.
const REQUESTS_AT_ONCE: u32 = 512;
/// CPU time of the guests that end soon.
const SHORT_MS: u64 = 10;
/// Longer than any bench: the node ends with whoever started it.
const LONG: Duration = Duration::from_secs(24 * 3_600);

/// The apps, in the order of their numbers.
#[derive(Clone, Copy)]
pub(crate) enum App {
    /// `examples/plain`, a fresh instance for each request, and the same with another text.
    Watched,
    Cheap,
    /// The same with instances that are used again.
    WatchedReuse,
    CheapReuse,
    /// A guest that burns until its limit, which is a second.
    Burn,
    /// The same with a limit of [`SHORT_MS`].
    Short,
}

const ALL: [App; 6] = [App::Watched, App::Cheap, App::WatchedReuse, App::CheapReuse, App::Burn, App::Short];

impl App {
    /// The host at which it answers.
    pub(crate) fn host(self) -> String {
        apps::host(self as usize)
    }

    fn isolation(self) -> Isolation {
        let reuse = || Isolation::Reuse(Reuse { requests_max: 100_000, ..Reuse::default() });
        if matches!(self, Self::WatchedReuse | Self::CheapReuse) { reuse() } else { Isolation::Fresh }
    }

    fn limits(self) -> Limits {
        let default = Limits { concurrent_requests: REQUESTS_AT_ONCE, ..Limits::default() };
        match self {
            Self::Burn => Limits { cpu_ms: 1_000, ..default },
            Self::Short => Limits { cpu_ms: SHORT_MS, ..default },
            _ => default,
        }
    }
}

/// Serves at a port, with what it compiled in a directory, until it is killed. The runtime is as the program's.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let [dir, port] = arguments else { anyhow::bail!("expected a directory and a port") };
    let (dir, port) = (Path::new(dir), port.parse::<u16>()?);
    let runtime = selvage_node::line::runtime()?;
    runtime.block_on(async {
        let state = tempfile::tempdir()?;
        let base = apps::base(state.path(), &dir.join("compiled")).await?;
        let parts = apps::parts()?;
        let made = tokio::task::spawn_blocking(move || {
            let (plain, burn) = (Template::plain()?, apps::hand_written("burn.wat")?);
            let app = |app: App| {
                let number = app as usize;
                let code = match app {
                    App::Burn | App::Short => burn.clone(),
                    _ => plain.code(u32::try_from(number)?),
                };
                let hosts = if matches!(app, App::Watched) { vec![LOOPBACK.to_owned()] } else { Vec::new() };
                apps::app_at(&base, &apps::name(number), hosts, code, &app.limits(), app.isolation())
            };
            ALL.into_iter().map(app).collect::<anyhow::Result<Vec<_>>>()
        });
        parts.table.store(Arc::new(Table::new(made.await??, apps::DOMAIN)?));
        let options =
            ListenOptions { http: Some((LOOPBACK.parse::<std::net::IpAddr>()?, port).into()), ..Default::default() };
        let listeners = Listeners::bind(&options, parts).await?;
        ensure!(listeners.http_addr().context("no address")?.port() == port, "another port");
        tokio::time::sleep(LONG).await;
        Ok(())
    })
}
