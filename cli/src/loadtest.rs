//! `selvage loadtest`: open-loop load; latency counts from the moment a request was due.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use bytes::Bytes;
use miette::Report;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use selvage_loadtest::{Arrivals, LoadError, Mix, Options, Progress, RequestClass, Scheme, StatusSet, Target};
use serde_json::{Map, json};

use crate::node::stopped;
use crate::output::{Output, failure, wrong};
use crate::token::TokenKey;

/// Shares of a JWT mix, percent: what callers of a real API send.
const JWT_MIX: [(&str, u32); 5] = [("valid", 90), ("none", 4), ("expired", 3), ("forged", 2), ("audience", 1)];

/// `selvage loadtest`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage loadtest https://hello.localhost:8443/ --ca ca.pem --rate 1000 --duration 30\n  selvage loadtest https://gate.localhost:8443/profile --ca ca.pem --jwt-key es256.pem --jwt-kid es256 \\\n    --jwt-issuer https://issuer.example --jwt-audience gate --mix h1=1,h2=2,h3=1\n\nExit code 1 when a request failed, an answer was not the expected one, or the run was not valid."
)]
pub(crate) struct Arguments {
    /// Where to. May be repeated; each request picks one.
    #[arg(required = true)]
    urls: Vec<Url>,

    /// Requests per second over everything.
    #[arg(long, default_value_t = 200)]
    rate: u32,

    /// Seconds.
    #[arg(long, default_value_t = 10)]
    duration: u64,

    /// Weights of the protocols. Default: what browsers use, h1=28,h2=51,h3=21; without TLS h1=1.
    #[arg(long, value_parser = mix)]
    mix: Option<Mix>,

    /// Connections per target and protocol.
    #[arg(long, default_value_t = 4)]
    connections: usize,

    /// The same seed sends the same requests at the same times.
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Requests at even distances instead of at random (Poisson) ones.
    #[arg(long)]
    even: bool,

    /// Trusted authorities, PEM. Needed for https.
    #[arg(long)]
    ca: Option<PathBuf>,

    /// Connect here instead of looking the host up.
    #[arg(long, value_name = "ADDRESS:PORT")]
    connect: Option<SocketAddr>,

    /// A header field, as NAME: VALUE. May be repeated.
    #[arg(short = 'H', long = "header", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,

    /// Statuses that count as right, as in 200 or 2xx or 401,403.
    #[arg(long, default_value = "2xx")]
    expect: StatusSet,

    /// Longest time for one request, milliseconds.
    #[arg(long, default_value_t = 10_000)]
    timeout_ms: u64,

    /// How late the generator may start 99 % of requests before a run does not count, milliseconds.
    #[arg(long, default_value_t = 10)]
    lag_ms: u64,

    #[command(flatten)]
    jwt: JwtArguments,
}

/// A mix of good and bad tokens.
#[derive(Debug, clap::Args)]
struct JwtArguments {
    /// Private key: send valid tokens and bad ones, and expect 401 for the bad.
    #[arg(long, requires_all = ["jwt_issuer", "jwt_audience"])]
    jwt_key: Option<PathBuf>,

    /// The key's name in the issuer's set.
    #[arg(long)]
    jwt_kid: Option<String>,

    /// `iss`.
    #[arg(long)]
    jwt_issuer: Option<String>,

    /// `aud`.
    #[arg(long)]
    jwt_audience: Option<String>,
}

fn mix(text: &str) -> Result<Mix, String> {
    let mut mix = Mix { h1: 0, h2: 0, h3: 0 };
    for part in text.split(',') {
        let (name, weight) = part.split_once('=').ok_or("expected h1=1,h2=2,h3=1")?;
        let weight = weight.parse().map_err(|_| format!("{weight:?} is no weight"))?;
        match name {
            "h1" => mix.h1 = weight,
            "h2" => mix.h2 = weight,
            "h3" => mix.h3 = weight,
            _ => return Err(format!("{name:?} is none of h1, h2, h3")),
        }
    }
    Ok(mix)
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or("expected NAME: VALUE")?;
    let name = name.trim().parse().map_err(|_| format!("{name:?} is no field name"))?;
    Ok((name, value.trim().parse().map_err(|_| format!("{value:?} is no field value"))?))
}

/// Runs a load test.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let options = options(&arguments)?;
    let progress = move |p: Progress| {
        let seconds = p.elapsed.as_secs_f64();
        output.progress(format_args!("{seconds:5.1} s  {} due, {} answered, {} errors", p.due, p.answered, p.errors));
    };
    let report =
        selvage_loadtest::run_until(options, stopped(), progress).await.map_err(|error| load_failure(&error))?;
    output.answer(&report, &report);
    Ok(if report.clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A run that could not start, with what to do.
pub(crate) fn load_failure(error: &LoadError) -> Report {
    let hint = matches!(error, LoadError::NoRoots { .. }).then_some("name the authority with --ca");
    failure("load test", error, hint)
}

fn options(arguments: &Arguments) -> Result<Options, Report> {
    let targets = arguments.urls.iter().map(|url| target(url, arguments.connect));
    let targets: Vec<Target> = targets.collect::<Result<_, _>>()?;
    let plain = targets.iter().all(|target| target.scheme == Scheme::Http);
    let browser = if plain { Mix { h1: 1, h2: 0, h3: 0 } } else { Mix { h1: 28, h2: 51, h3: 21 } };
    Ok(Options {
        targets,
        rate: arguments.rate,
        duration: Duration::from_secs(arguments.duration),
        seed: arguments.seed,
        mix: arguments.mix.unwrap_or(browser),
        connections: arguments.connections,
        arrivals: if arguments.even { Arrivals::Even } else { Arrivals::Poisson },
        requests: classes(arguments)?,
        roots: arguments.ca.as_deref().map_or(Ok(Vec::new()), roots)?,
        in_flight_max: 10_000,
        timeout: Duration::from_millis(arguments.timeout_ms),
        lag_p99_max: Duration::from_millis(arguments.lag_ms),
    })
}

/// Certificates of a PEM file.
pub(crate) fn roots(path: &Path) -> Result<Vec<rustls::pki_types::CertificateDer<'static>>, Report> {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject;
    let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    certificates.map_err(|error| wrong(format!("read {}: {error}", path.display()), Some("give a PEM file")))
}

fn target(url: &Url, connect: Option<SocketAddr>) -> Result<Target, Report> {
    let bad =
        |reason: &str| wrong(format!("{url}: {reason}"), Some("give a URL such as https://hello.localhost:8443/"));
    let scheme = match url.scheme() {
        "https" => Scheme::Https,
        "http" => Scheme::Http,
        _ => return Err(bad("the scheme must be https or http")),
    };
    let host = url.host_str().ok_or_else(|| bad("has no host"))?.to_owned();
    let port = url.port_or_known_default().ok_or_else(|| bad("has no port"))?;
    // RFC 6761 6.3: names below localhost are this machine, whatever the resolver thinks.
    let lookup = if host.ends_with(".localhost") { "localhost" } else { &host };
    let looked_up = || (lookup.trim_matches(['[', ']']), port).to_socket_addrs().ok()?.min_by_key(SocketAddr::is_ipv6);
    let addr = connect.or_else(looked_up).ok_or_else(|| bad("the host is not known"))?;
    Ok(Target { scheme, host, port, addr })
}

fn classes(arguments: &Arguments) -> Result<Vec<RequestClass>, Report> {
    let url = &arguments.urls[0];
    let path = url.query().map_or(url.path().to_owned(), |query| format!("{}?{query}", url.path()));
    let headers: HeaderMap = arguments.headers.iter().cloned().collect();
    let plain = RequestClass {
        name: "request".into(),
        weight: 1,
        method: reqwest::Method::GET,
        path,
        headers,
        body: Bytes::new(),
        expect: arguments.expect.clone(),
        host: None,
    };
    let Some(key) = &arguments.jwt.jwt_key else { return Ok(vec![plain]) };
    let text = std::fs::read_to_string(key).map_err(|e| wrong(format!("read {}: {e}", key.display()), None))?;
    let key = TokenKey::of_pem(&text).ok_or_else(|| wrong(format!("{} is no PKCS #8 key", key.display()), None))?;
    let kid = arguments.jwt.jwt_kid.clone().unwrap_or_else(|| key.thumbprint());
    let issuer = arguments.jwt.jwt_issuer.as_deref().unwrap_or_default();
    let audience = arguments.jwt.jwt_audience.as_deref().unwrap_or_default();
    let unauthorized: StatusSet = "401".parse().map_err(|e| wrong(format!("{e}"), None))?;
    let mut classes = Vec::new();
    for (name, weight) in JWT_MIX {
        let token = token(&key, &kid, issuer, audience, name)?;
        let mut class = RequestClass { name: name.into(), weight, ..plain.clone() };
        if name != "valid" {
            class.expect = unauthorized.clone();
        }
        if let Some(token) = token {
            let value =
                HeaderValue::from_str(&format!("Bearer {token}")).map_err(|e| failure("write a token", &e, None))?;
            class.headers.insert(AUTHORIZATION, value);
        }
        classes.push(class);
    }
    Ok(classes)
}

/// A token of one kind of the mix; `None` for no token at all.
pub(crate) fn token(
    key: &TokenKey,
    kid: &str,
    issuer: &str,
    audience: &str,
    kind: &str,
) -> Result<Option<String>, Report> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_err(|error| failure("read the clock", &error, None))?.as_secs();
    let expires = if kind == "expired" { now - 3_600 } else { now + 86_400 };
    let audience = if kind == "audience" { "somebody-else" } else { audience };
    let claims = json!({ "iss": issuer, "aud": audience, "sub": "loadtest", "iat": now - 7_200, "exp": expires });
    let claims: Map<_, _> = claims.as_object().cloned().unwrap_or_default();
    let token = key.token(kid, &claims)?;
    Ok(match kind {
        "none" => None,
        "forged" => Some(forged(&token)),
        _ => Some(token),
    })
}

/// The same token with another signature.
fn forged(token: &str) -> String {
    let (signed, signature) = token.rsplit_once('.').unwrap_or((token, ""));
    let first = if signature.starts_with('A') { 'B' } else { 'A' };
    format!("{signed}.{first}{}", signature.get(1..).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_names_its_protocols() {
        let mix = mix("h1=1,h3=2").unwrap();
        assert_eq!((mix.h1, mix.h2, mix.h3), (1, 0, 2));
        for bad in ["", "h1", "h4=1", "h1=x"] {
            assert!(super::mix(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_forged_token_differs_in_its_signature_only() {
        assert_eq!(forged("h.p.Asig"), "h.p.Bsig");
        assert_eq!(forged("h.p.xsig"), "h.p.Asig");
    }
}
