//! The way to the servers: addresses, credentials and TLS, as the configuration says.

use std::path::Path;
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use rustls::RootCertStore;
use selvage_certs::{client, roots_from_pem};
use selvage_config::control_plane::NatsConfig;

use super::JournalError;

/// Bytes of a file with a password, a token, a seed or credentials.
const SECRET_BYTES_MAX: u64 = 16 * 1024;
/// How often a quiet connection is asked whether it lives; two answers that do not come end it.
const PING: Duration = Duration::from_secs(2);
/// Pauses between tries to connect: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(4));

/// Begins to connect, and goes on trying for as long as the client lives.
pub(super) async fn connect(config: &NatsConfig) -> Result<Client, JournalError> {
    let servers: Vec<ServerAddr> = config
        .servers
        .iter()
        .map(|server| server.parse().map_err(|_| JournalError::Setting("a server's address can't be read".into())))
        .collect::<Result<_, _>>()?;
    let request = Duration::from_millis(config.request_ms);
    let mut options = ConnectOptions::new()
        .name("selvage control plane")
        .connection_timeout(request)
        .request_timeout(Some(request))
        .ping_interval(PING)
        .retry_on_initial_connect()
        .reconnect_delay_callback(pause)
        .event_callback(|event| async move { tell(&event) });
    let is_tls = config.roots.is_some() || config.servers.iter().any(|server| server.starts_with("tls://"));
    let roots = match &config.roots {
        Some(path) => roots_from_pem(path).map_err(|error| JournalError::Setting(error.to_string()))?,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    // Given also where it is not asked for: a server may demand it.
    options = options.tls_client_config(client(&roots)).require_tls(is_tls);
    if let (Some(user), Some(path)) = (&config.user, &config.password_file) {
        options = options.user_and_password(user.clone(), secret(path)?);
    } else if let Some(path) = &config.token_file {
        options = options.token(secret(path)?);
    } else if let Some(path) = &config.nkey_file {
        options = options.nkey(secret(path)?);
    } else if let Some(path) = &config.credentials_file {
        let failed = |_| JournalError::Setting(format!("{} holds no credentials", path.display()));
        // The client wants the end of the last line, which is no part of a secret elsewhere.
        options = options.credentials(&format!("{}\n", secret(path)?)).map_err(failed)?;
    }
    options.connect(servers).await.map_err(|error| JournalError::Setting(error.to_string()))
}

fn secret(path: &Path) -> Result<String, JournalError> {
    let read = || -> std::io::Result<String> {
        if std::fs::metadata(path)?.len() > SECRET_BYTES_MAX {
            return Err(std::io::Error::other("the file is too large"));
        }
        Ok(std::fs::read_to_string(path)?.trim().to_owned())
    };
    read().map_err(|error| JournalError::Setting(format!("read {}: {error}", path.display())))
}

/// Twice as long after each try, with a part of chance: control planes that lost one server do not come back as one.
fn pause(tries: usize) -> Duration {
    let (first, most) = PAUSE;
    let longest = first.saturating_mul(1_u32 << tries.min(10)).min(most);
    longest / 2 + longest.mul_f64(super::chance() / 2.0)
}

fn tell(event: &Event) {
    match event {
        Event::Connected => tracing::info!("connected to the NATS server"),
        Event::Disconnected => tracing::warn!("the connection to the NATS server is lost: changes wait, plans go on"),
        Event::SlowConsumer(_) => tracing::warn!("this control plane is too slow for what it is told by NATS"),
        other => tracing::debug!(event = %other, "nats"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_somewhere() {
        assert!(pause(0) >= PAUSE.0 / 2 && pause(0) <= PAUSE.0);
        for tries in [5, 20, usize::MAX] {
            assert!(pause(tries) <= PAUSE.1 && pause(tries) >= Duration::from_millis(750), "{tries}");
        }
    }
}
