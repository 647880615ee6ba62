//! `selvage up`: one app alone on this machine, with the flags that users know from `spin up`.

mod runtime_config;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use miette::Report;
use selvage_config::app::{App, Target};
use selvage_config::bundle::Bundle;
use selvage_config::node::CertificateFiles;
use selvage_config::{ComponentName, StoreLabel};
use selvage_node::node::{Node, UpOptions};

use crate::deploy::pair;
use crate::node::stopped;
use crate::output::{Output, failure, wrong};
use runtime_config::RuntimeConfig;

/// Ports that `--find-free-port` tries after the one asked for.
const PORTS_TRIED: u16 = 100;

/// `selvage up`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage up                                  the spin.toml here, at http://127.0.0.1:3000\n  selvage up hello.wasm --listen 127.0.0.1:8080\n  selvage up -f app/ --variable greeting=Hi --key-value default/colour=red\n  selvage up --tls-cert cert.pem --tls-key key.pem    HTTP/1.1, HTTP/2 and HTTP/3"
)]
pub(crate) struct Arguments {
    /// A spin.toml, a directory with one, or a .wasm file. Default: spin.toml here.
    #[arg(conflicts_with = "from", value_name = "PATH")]
    path: Option<PathBuf>,

    /// The same, as `spin up` writes it.
    #[arg(short, long, visible_alias = "file", value_name = "PATH")]
    from: Option<PathBuf>,

    /// Where to listen.
    #[arg(long, default_value = "127.0.0.1:3000", env = "SELVAGE_HTTP_LISTEN_ADDR", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,

    /// Take the next free port when that one is taken.
    #[arg(long)]
    find_free_port: bool,

    /// Certificate chain, PEM; with --tls-key. HTTP/3 then answers on the same port.
    #[arg(long, env = "SELVAGE_TLS_CERT", requires = "tls_key", value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// Private key, PEM.
    #[arg(long, env = "SELVAGE_TLS_KEY", requires = "tls_cert", value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Only these components. May be repeated.
    #[arg(short, long = "component-id", value_name = "NAME")]
    component: Vec<ComponentName>,

    /// Environment of every component, as NAME=VALUE. May be repeated.
    #[arg(short, long, value_parser = pair, value_name = "NAME=VALUE")]
    env: Vec<(String, String)>,

    /// A variable of the app, as NAME=VALUE or NAME=@FILE. May be repeated.
    #[arg(long = "variable", value_parser = pair, value_name = "NAME=VALUE")]
    variables: Vec<(String, String)>,

    /// A key to set at the start, as KEY=VALUE in the store `default`, or LABEL/KEY=VALUE. May be repeated.
    #[arg(long = "key-value", value_parser = pair, value_name = "KEY=VALUE")]
    key_values: Vec<(String, String)>,

    /// Where KV stays. Default: nowhere; it goes when the program ends.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    #[command(flatten)]
    cache: CacheArguments,

    /// Spin's runtime configuration: variables providers, state_dir, max_instance_memory.
    #[arg(long, env = "RUNTIME_CONFIG_FILE", value_name = "FILE")]
    runtime_config_file: Option<PathBuf>,

    /// Most memory of an instance, bytes.
    #[arg(long, env = "SPIN_MAX_INSTANCE_MEMORY", value_name = "BYTES")]
    max_instance_memory: Option<u64>,

    /// Print nothing but mistakes.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Where compiled code is kept between runs.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct CacheArguments {
    /// Where compiled code is kept between runs. Default: selvage/compiled in the user's cache directory.
    #[arg(long, value_name = "DIR", env = "SELVAGE_CACHE_DIR")]
    cache_dir: Option<PathBuf>,

    /// Compile anew, and keep nothing.
    #[arg(long)]
    disable_cache: bool,

    #[arg(long, hide = true, env = "XDG_CACHE_HOME")]
    user_cache: Option<PathBuf>,

    #[arg(long, hide = true, env = "HOME")]
    home: Option<PathBuf>,
}

impl CacheArguments {
    /// The directory, if code is to be kept.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        let own = || {
            let user = self.user_cache.clone().or_else(|| Some(self.home.as_ref()?.join(".cache")))?;
            Some(user.join("selvage/compiled"))
        };
        if self.disable_cache { None } else { self.cache_dir.clone().or_else(own) }
    }
}

/// Serves one app until told to stop.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let quiet = arguments.quiet;
    let (mut options, find_free_port) = options(arguments)?;
    let app = options.bundle.app.clone();
    let secure = options.tls.is_some();
    if find_free_port {
        options.listen = free_port(options.listen)?;
    }
    let hint = "is the port taken? choose another with --listen, or add --find-free-port";
    if !quiet {
        output.progress(format_args!("preparing {}: what was not compiled before takes a while", app.name));
    }
    let node = Node::up(options).await.map_err(|error| {
        let told = error.to_string().contains("listen");
        failure("serve the app", &error, told.then_some(hint))
    })?;
    let addresses = node.addresses();
    let address = addresses.https.or(addresses.http);
    let stopped = stopped();
    let base = address.map_or(String::new(), |a| format!("{}://{a}", if secure { "https" } else { "http" }));
    if !quiet {
        let answer = serde_json::json!({ "app": app.name, "url": base });
        output.answer(&answer, routes(&app, &base));
    }
    stopped.await;
    node.drain().await;
    Ok(ExitCode::SUCCESS)
}

fn options(arguments: Arguments) -> Result<(UpOptions, bool), Report> {
    let runtime = arguments.runtime_config_file.as_deref().map(RuntimeConfig::load).transpose()?.unwrap_or_default();
    let path = arguments.from.or(arguments.path).unwrap_or_else(|| "spin.toml".into());
    let mut bundle = Bundle::load(&path)?;
    only(&mut bundle.app, &arguments.component)?;
    let memory = arguments.max_instance_memory.or(runtime.max_instance_memory);
    for component in bundle.app.components.values_mut() {
        component.limits.memory_bytes = memory.unwrap_or(component.limits.memory_bytes);
    }
    // What the command line says beats the file, and the file's later providers beat nothing that is there already.
    let mut variables = BTreeMap::new();
    for (name, value) in &arguments.variables {
        variables.insert(name.clone(), value_or_file(value)?);
    }
    for (name, value) in runtime.variables(bundle.app.variables.keys()) {
        variables.entry(name).or_insert(value);
    }
    bundle.app.check().map_err(|error| wrong(error.to_string(), None))?;
    let key_values = arguments.key_values.into_iter().map(key_value).collect::<Result<_, Report>>()?;
    let tls = arguments.tls_cert.zip(arguments.tls_key);
    let tls = tls.map(|(certificate, key)| CertificateFiles { certificate, key });
    let options = UpOptions {
        bundle,
        listen: arguments.listen,
        tls,
        variables,
        environment: arguments.env.into_iter().collect(),
        private_networks: true,
        state_dir: arguments.state_dir.or(runtime.state_dir),
        compiled_dir: arguments.cache.directory(),
        values: key_values,
    };
    Ok((options, arguments.find_free_port))
}

/// Keeps only `names`, and the routes that lead to them.
fn only(app: &mut App, names: &[ComponentName]) -> Result<(), Report> {
    if names.is_empty() {
        return Ok(());
    }
    if let Some(unknown) = names.iter().find(|name| !app.components.contains_key(*name)) {
        let known: Vec<&str> = app.components.keys().map(ComponentName::as_str).collect();
        let hint = format!("the app has: {}", known.join(", "));
        return Err(wrong(format!("no component is named {unknown}"), Some(&hint)));
    }
    app.components.retain(|name, _| names.contains(name));
    app.routes.retain(|route| !matches!(&route.target, Target::Component(name) if !names.contains(name)));
    Ok(())
}

fn value_or_file(value: &str) -> Result<String, Report> {
    let Some(path) = value.strip_prefix('@') else { return Ok(value.to_owned()) };
    std::fs::read_to_string(path).map_err(|error| wrong(format!("read {path}: {error}"), None))
}

fn key_value((key, value): (String, String)) -> Result<(StoreLabel, String, Bytes), Report> {
    let (label, key) = key.split_once('/').unwrap_or(("default", &key));
    let label = label.parse().map_err(|error| wrong(format!("--key-value: {error}"), None))?;
    Ok((label, key.to_owned(), value_or_file(&value)?.into()))
}

/// The first address from `asked` on whose port is free.
fn free_port(asked: SocketAddr) -> Result<SocketAddr, Report> {
    let candidates = (0..PORTS_TRIED).filter_map(|step| {
        let port = asked.port().checked_add(step)?;
        Some(SocketAddr::new(asked.ip(), port))
    });
    let mut free = candidates.filter(|address| std::net::TcpListener::bind(address).is_ok());
    free.next().ok_or_else(|| wrong(format!("no port from {} on is free", asked.port()), Some("choose --listen")))
}

fn routes(app: &App, base: &str) -> String {
    let mut text = format!("Serving {base}\nRoutes:\n");
    for route in &app.routes {
        let who = match &route.target {
            Target::Component(name) => name.as_str(),
            Target::Static(_) => "static response",
        };
        let pattern = route.pattern.prefix();
        let wildcard = if route.pattern.is_wildcard() { " (and below)" } else { "" };
        let _ = writeln!(text, "  {who}: {base}{pattern}{wildcard}");
    }
    text
}

#[cfg(test)]
mod tests {
    use selvage_config::Digest;

    use super::*;

    #[test]
    fn a_key_value_names_its_store_or_means_default() {
        let of = |key: &str| key_value((key.to_owned(), "v".to_owned())).unwrap();
        assert_eq!(of("colour").0.as_str(), "default");
        let (label, key, value) = of("other/a/b");
        assert_eq!((label.as_str(), key.as_str(), value.as_ref()), ("other", "a/b", b"v".as_slice()));
        assert!(key_value(("-/a".to_owned(), "v".to_owned())).is_err());
    }

    #[test]
    fn only_the_named_components_are_kept() {
        let mut app = App::of_component("a".parse().unwrap(), "c".parse().unwrap(), Digest::of(b""));
        assert!(only(&mut app, &["d".parse().unwrap()]).is_err());
        only(&mut app, &["c".parse().unwrap()]).unwrap();
        assert_eq!(app.routes.len(), 1);
    }

    #[test]
    fn a_taken_port_is_passed_over() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let asked = taken.local_addr().unwrap();
        assert!(free_port(asked).unwrap().port() > asked.port());
    }
}
