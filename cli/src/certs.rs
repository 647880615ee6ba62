//! `selvage certs`: the fleet's own authority and what it issues.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use miette::Report;
use selvage_certs::{Authority, Identity, OperatorName, Role, Rotation, RotationError};
use selvage_config::{NodeName, Region};

use crate::context::Context;
use crate::output::{Output, failure, wrong};

/// `selvage certs`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage certs control-plane --name cp.example --address 192.0.2.1\n  selvage certs node fra-1 --region fra --address 192.0.2.7\n  selvage certs operator alice --control-plane https://cp.example:7400\n  selvage certs server '*.apps.example'\n\nThe authority is made in --dir at the first call; keep ca-key.pem off the nodes."
)]
pub(crate) struct Arguments {
    /// Where the authority and what it issues lie.
    #[arg(long, default_value = "certs", global = true)]
    dir: PathBuf,

    #[command(subcommand)]
    whom: Whom,
}

#[derive(Debug, Subcommand)]
enum Whom {
    /// An identity for the control plane.
    ControlPlane {
        /// A DNS name that clients connect by. May be repeated.
        #[arg(long)]
        name: Vec<String>,
        /// An address that clients connect by. May be repeated. Default 127.0.0.1.
        #[arg(long)]
        address: Vec<IpAddr>,
    },
    /// An identity for a node.
    Node {
        /// Its name.
        node: NodeName,
        /// Where it stands.
        #[arg(long)]
        region: Region,
        /// An address that its admin listener is reached by. May be repeated. Default 127.0.0.1.
        #[arg(long)]
        address: Vec<IpAddr>,
    },
    /// An identity for an operator, and a context file for the commands.
    Operator {
        /// The operator's name.
        name: OperatorName,
        /// `https://host:port` of the control plane. May be repeated, for several with one state.
        #[arg(long, required = true)]
        control_plane: Vec<String>,
    },
    /// Puts another authority in the place of this one, without a pause: `begin`, wait, `switch`, wait, `finish`.
    Rotate {
        /// Which step.
        #[arg(value_enum)]
        step: Step,
    },
    /// A certificate for a public listener, by the fleet's own authority: for tests and private networks.
    Server {
        /// DNS names; `*.` stands for one label.
        #[arg(required = true)]
        names: Vec<String>,
        /// An address. May be repeated.
        #[arg(long)]
        address: Vec<IpAddr>,
    },
}

/// A step of a rotation.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Step {
    /// A new authority is believed beside the old one, which goes on issuing.
    Begin,
    /// The new one issues; both are believed.
    Switch,
    /// The old one is believed no more.
    Finish,
}

impl Step {
    /// The step, and what to do and to wait for when it is taken.
    fn take(self) -> (Rotation, &'static str) {
        match self {
            Self::Begin => (
                Rotation::Begin,
                "next: put ca.pem wherever else it was copied; when no node of `selvage nodes` has \"old authorities\", `selvage certs rotate switch`",
            ),
            Self::Switch => (
                Rotation::Switch,
                "next: make the control plane's identity anew, and those of operators; when no node of `selvage nodes` has an \"old certificate\", `selvage certs rotate finish`",
            ),
            Self::Finish => {
                (Rotation::Finish, "done: certificates of the old authority are worth nothing within seconds")
            }
        }
    }
}

fn rotate(dir: &Path, step: Step, output: Output) -> Result<ExitCode, Report> {
    let (rotation, next) = step.take();
    Authority::rotate(dir, rotation).map_err(|error| match error {
        RotationError::Order(reason) => wrong(reason, Some("the steps are begin, switch, finish")),
        error => failure("rotate the fleet's authority", &error, None),
    })?;
    output.answer(&serde_json::json!({ "authority": dir.join("ca.pem"), "next": next }), next);
    Ok(ExitCode::SUCCESS)
}

/// Issues what is asked for.
pub(crate) fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let authority = Authority::open_or_create(&arguments.dir)
        .map_err(|error| failure("open the fleet's authority", &error, None))?;
    let failed = |error| failure("issue a certificate", &error as &selvage_certs::AuthorityError, None);
    let local = |addresses: Vec<IpAddr>| {
        if addresses.is_empty() { vec![IpAddr::V4(Ipv4Addr::LOCALHOST)] } else { addresses }
    };
    let dir = &arguments.dir;
    let files = match arguments.whom {
        Whom::ControlPlane { name, address } => {
            let identity = authority.issue_identity(&Role::ControlPlane, &local(address), &name).map_err(failed)?;
            save(&identity, dir, "control-plane")?
        }
        Whom::Node { node, region, address } => {
            let role = Role::Node { region, node: node.clone() };
            let identity = authority.issue_identity(&role, &local(address), &[]).map_err(failed)?;
            save(&identity, dir, &format!("node-{node}"))?
        }
        Whom::Operator { name, control_plane } => {
            let stem = format!("operator-{name}");
            let identity = authority.issue_identity(&Role::Operator { name }, &[], &[]).map_err(failed)?;
            let mut files = save(&identity, dir, &stem)?;
            let context = Context {
                control_plane: control_plane.into(),
                roots: "ca.pem".into(),
                certificate: Some(format!("{stem}.pem").into()),
                key: Some(format!("{stem}.key").into()),
                token_file: None,
            };
            let path = dir.join("context.toml");
            context.save(&path)?;
            files.push(path);
            files
        }
        Whom::Rotate { step } => return rotate(dir, step, output),
        Whom::Server { names, address } => {
            let identity = authority.issue_server(&names, &address).map_err(failed)?;
            save(&identity, dir, "server")?
        }
    };
    let text = files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join("\n");
    output.answer(&serde_json::json!({ "authority": dir.join("ca.pem"), "files": files }), text);
    Ok(ExitCode::SUCCESS)
}

/// Writes `stem.pem` and `stem.key`.
pub(crate) fn save(identity: &Identity, dir: &Path, stem: &str) -> Result<Vec<PathBuf>, Report> {
    let (certificate, key) = (dir.join(format!("{stem}.pem")), dir.join(format!("{stem}.key")));
    identity.save(&certificate, &key).map_err(|error| failure("save a certificate", &error, None))?;
    Ok(vec![certificate, key])
}
