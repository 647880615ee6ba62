//! Control planes of one fleet, each with a state directory of its own, some of them processes of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_config::plan::{AppStatus, Plan, Serving};
use selvage_control_plane::ControlPlane;

use super::server::Server;
use crate::world::{Asker, World, status};

/// How long a condition may take to come true on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// Tells the test program to be a control plane: the file of its configuration.
const CHILD: &str = "SELVAGE_TEST_CONTROL_PLANE";

pub(super) struct Fleet {
    world: World,
    nats: String,
    running: BTreeMap<&'static str, ControlPlane>,
}

pub(super) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Fleet {
    pub(super) async fn begin(server: &Server) -> Self {
        Self::over(World::start().await, server).await
    }

    /// Over several servers, which a control plane's file names so.
    pub(super) async fn with(nats: String) -> Self {
        Self::of(World::start().await, nats).await
    }

    /// In the place of the one control plane of this world.
    pub(super) async fn over(world: World, server: &Server) -> Self {
        Self::of(world, server.config()).await
    }

    async fn of(mut world: World, nats: String) -> Self {
        world.stop().await;
        std::fs::write(world.directory.path().join("sealing.key"), format!("{}\n", "cd".repeat(32))).unwrap();
        Self { world, nats, running: BTreeMap::new() }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.world.directory.path().join(name)
    }

    pub(super) fn config(&self, name: &str) -> ControlPlaneConfig {
        ControlPlaneConfig {
            state_dir: self.path(name),
            sealing_key: Some(self.path("sealing.key")),
            authority: Some(self.path("ca")),
            nats: Some(toml::from_str(&self.nats).unwrap()),
            ..self.world.config()
        }
    }

    pub(super) async fn start(&mut self, name: &'static str) -> Asker {
        let config = self.config(name);
        self.start_as(name, config).await
    }

    pub(super) async fn start_as(&mut self, name: &'static str, config: ControlPlaneConfig) -> Asker {
        let control_plane = ControlPlane::start(config).await.unwrap();
        let asker = self.world.ops().at(&format!("https://{}", control_plane.address()));
        self.running.insert(name, control_plane);
        asker
    }

    pub(super) async fn stop_one(&mut self, name: &str) {
        self.running.remove(name).unwrap().stop().await;
    }

    pub(super) async fn stop(&mut self) {
        for (_, control_plane) in std::mem::take(&mut self.running) {
            control_plane.stop().await;
        }
    }

    /// The same as a process of its own, which can be killed.
    pub(super) async fn start_process(&self, name: &str) -> (Child, Asker) {
        let config = self.config(name);
        let path = |path: &PathBuf| format!("{path:?}");
        let (identity, operator) = (&config.identity, &config.operators[0]);
        let text = format!(
            "listen = \"127.0.0.1:0\"\nstate_dir = {}\nsealing_key = {}\nauthority = {}\n\
             [identity]\ncertificate = {}\nkey = {}\nroots = {}\n\
             [[operators]]\nname = \"ops\"\ntoken_digest = \"{}\"\n[nats]\n{}",
            path(&config.state_dir),
            path(&self.path("sealing.key")),
            path(&self.path("ca")),
            path(&identity.certificate),
            path(&identity.key),
            path(&identity.roots),
            operator.token_digest.unwrap(),
            self.nats,
        );
        let file = self.path(&format!("{name}.toml"));
        std::fs::write(&file, text).unwrap();
        let mut program = Command::new(std::env::current_exe().unwrap());
        let program = program.args(["--exact", "shared::fleet::a_process_of_its_own", "--nocapture"]);
        let child = program.env(CHILD, &file).stdout(Stdio::null()).spawn().unwrap();
        let told = file.with_extension("address");
        until("the process listens", async || told.exists()).await;
        let address = std::fs::read_to_string(told).unwrap();
        (child, self.world.ops().at(&format!("https://{address}")))
    }

    pub(super) fn node(&self, name: &str, at: &Asker) -> Asker {
        self.world.node(name).at(at.url())
    }

    /// The node takes its plan in, and tells so.
    pub(super) async fn turn(&self, name: &str, at: &Asker) {
        let node = self.node(name, at);
        let plan: Plan = node.get(&format!("/api/v1/plans/{name}")).await.json().await.unwrap();
        let apps = plan.releases.iter().map(|release| AppStatus {
            app: release.id.app.clone(),
            serving: Some(Serving { release: release.id.clone(), manifest: release.manifest }),
            refused: None,
            candidate: None,
        });
        let told = status(name, plan.generation, None, apps.collect());
        assert_eq!(node.tell(&told).await.status(), StatusCode::NO_CONTENT);
    }
}

/// No test of its own: it is what [`Fleet::start_process`] runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_its_own() {
    let Some(file) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let config = ControlPlaneConfig::parse(&file, &std::fs::read_to_string(&file).unwrap()).unwrap();
    let control_plane = ControlPlane::start(config).await.unwrap();
    let aside = file.with_extension("partial");
    std::fs::write(&aside, control_plane.address().to_string()).unwrap();
    std::fs::rename(aside, file.with_extension("address")).unwrap();
    // Nobody waits longer than this for it to be killed.
    tokio::time::sleep(2 * PATIENCE).await;
    control_plane.stop().await;
}
