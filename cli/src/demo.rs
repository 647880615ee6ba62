//! `selvage demo`: a whole fleet on this machine. `--check` walks the tour by itself.

mod apps;
mod fleet;
mod tour;
mod visit;

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use miette::Report;

use crate::node::stopped;
use crate::output::{Output, failure, table};
use fleet::Fleet;

/// `selvage demo`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage demo                 start, print what runs where and curl lines, wait for Ctrl-C\n  selvage demo --check         walk the tour: one line a stop, exit code 1 if one fails"
)]
pub(crate) struct Arguments {
    /// Walk the tour by itself and exit.
    #[arg(long)]
    check: bool,

    /// Where everything is kept. Default: a temporary directory that goes with the program.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// First port to try for the nodes' fronts. Taken ones are passed over.
    #[arg(long, default_value_t = 8443)]
    port: u16,

    /// Take the example apps from here instead of those built in.
    #[arg(long, value_name = "DIR")]
    examples: Option<PathBuf>,
}

/// Starts the fleet; then waits, or walks the tour.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let temporary = tempfile::Builder::new().prefix("selvage-demo-").tempdir();
    let temporary = temporary.map_err(|error| failure("make a temporary directory", &error, None))?;
    let directory = arguments.state_dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let began = Instant::now();
    let mut fleet = Fleet::start(&directory, arguments.port, output).await?;
    let published = apps::publish(&fleet, arguments.examples.as_deref(), output).await;
    if let Err(error) = published {
        fleet.stop().await;
        return Err(error);
    }
    let stopped = stopped();
    output.progress(format_args!("ready after {:.1} s", began.elapsed().as_secs_f64()));
    let code = if arguments.check {
        // Dropping the tour in the middle loses nothing: the fleet is stopped below.
        tokio::select! {
            code = tour::walk(&mut fleet, output) => code,
            () = stopped => ExitCode::FAILURE,
        }
    } else {
        output.answer(&fleet.description(), description(&fleet));
        stopped.await;
        output.progress("stopping");
        ExitCode::SUCCESS
    };
    fleet.stop().await;
    Ok(code)
}

/// What runs where, and lines to paste.
fn description(fleet: &Fleet) -> String {
    let rows = fleet.nodes().map(|node| {
        let front = node.front();
        vec![node.name.to_string(), node.region.to_string(), format!("https://<app>.localhost:{}", front.port())]
    });
    let program = std::env::current_exe().map_or("selvage".into(), |path| path.display().to_string());
    let mut text = table(&["NODE", "REGION", "FRONT (HTTP/1.1, HTTP/2, HTTP/3)"], &rows.collect::<Vec<_>>());
    let ca = fleet.certs().join("ca.pem");
    let ca = ca.display();
    let ports: Vec<u16> = fleet.nodes().map(|node| node.front().port()).collect();
    let (first, last) = (ports[0], ports[ports.len() - 1]);
    let context = fleet.context();
    let context = context.display();
    let _ = write!(
        text,
        "\n\ncontrol plane https://{}\n\n\
         curl --cacert {ca} https://hello.localhost:{first}/\n\
         curl --cacert {ca} --http2 https://hello-p3.localhost:{last}/\n\
         curl --cacert {ca} -X PUT -d blue https://counter.localhost:{first}/kv/colour\n\
         curl --cacert {ca} https://counter.localhost:{last}/kv/colour          # the same, in another region\n\
         curl --cacert {ca} -i https://gate.localhost:{first}/profile            # 401: no token\n\
         TOKEN=$({program} token --key {} --kid es256 --issuer {} --audience gate --subject ada)\n\
         curl --cacert {ca} -H \"authorization: Bearer $TOKEN\" https://gate.localhost:{first}/profile\n\n\
         export SELVAGE_CONTEXT={context}\n\
         {program} nodes\n{program} releases\n{program} kv --node fra-1 peers\n\nCtrl-C stops everything.",
        fleet.control_plane_address(),
        fleet.token_key().display(),
        apps::ISSUER,
    );
    text
}
