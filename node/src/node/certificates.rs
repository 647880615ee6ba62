//! What the front of a node shows, from files and by ACME, and who looks after it.

use std::sync::Arc;

use selvage_certs::{FrontSecret, FrontServers, FrontTls, NameRules, PemFiles, Reload, Reloaded, TlsVersions};
use selvage_config::node::{
    Acme as AcmeSettings, AcmeChallenge, CertificateFiles, NodeConfig, TlsProvider, TlsSettings, TlsVersionMin,
};

use super::{CERTIFICATES_LOOK, StartError};
use crate::acme::Acme;
use crate::metrics::Metrics;
use crate::release::origin::chain;

/// The certificates of the front, if there are any, or if there will be some. The first is also for clients that name no
/// host, or one that no certificate is for.
pub(super) fn certificates(
    files: &[CertificateFiles],
    provider: TlsProvider,
    has_acme: bool,
) -> Result<Option<Reload>, StartError> {
    let pem = |files: &CertificateFiles| PemFiles { certificate: files.certificate.clone(), key: files.key.clone() };
    let named: Vec<PemFiles> = files.iter().map(pem).collect();
    let first = named.first().cloned();
    if first.is_none() && !has_acme {
        return Ok(None);
    }
    Ok(Some(Reload::open(named, first, provider)?))
}

/// Who gets certificates from an authority, if somebody shall.
pub(super) fn acme_of(config: &NodeConfig, reload: Option<&Reload>) -> Result<Option<Acme>, StartError> {
    let Some((settings, reload)) = config.acme.clone().zip(reload) else { return Ok(None) };
    let provider = config.tls.provider;
    Ok(Some(Acme::open(settings, &config.state_dir, reload.resolver(), provider).map_err(Box::new)?))
}

/// A secret for one process: its tickets end with it.
pub(super) fn own_secret() -> Result<FrontSecret, StartError> {
    FrontSecret::random().map_err(StartError::Random)
}

pub(super) fn front_tls(
    reload: &Reload,
    settings: &TlsSettings,
    acme: Option<&AcmeSettings>,
    (rules, secret): (Arc<NameRules>, FrontSecret),
) -> FrontTls {
    let versions = match settings.version_min {
        TlsVersionMin::V12 => TlsVersions::From12,
        TlsVersionMin::V13 => TlsVersions::Only13,
    };
    let has_challenges = acme.is_some_and(|acme| acme.challenge() == AcmeChallenge::TlsAlpn01);
    let (resolver, provider, has_early_data) = (reload.resolver(), settings.provider, settings.early_data);
    FrontTls { resolver, provider, secret, versions, has_challenges, has_early_data, rules }
}

/// Takes new certificates as they come, and new authorities of clients. Bad ones are told, and the old ones stay.
pub(super) async fn look_at_certificates(mut reload: Reload, servers: Option<Arc<FrontServers>>, metrics: Metrics) {
    loop {
        let ends = reload.identities().map(|one| (one.names().first().map_or("", String::as_str), one.not_after()));
        metrics.certificates("file", ends);
        tokio::time::sleep(CERTIFICATES_LOOK).await;
        let shown = servers.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let done = reload.reload();
            let asked = shown.map_or(Ok(Reloaded::Unchanged), |servers| servers.reload());
            (reload, done, asked)
        });
        let Ok((back, done, asked)) = looked.await else { return };
        reload = back;
        match asked {
            Ok(Reloaded::Unchanged) => {}
            Ok(Reloaded::Changed) => tracing::info!("new authorities of clients"),
            Err(error) => tracing::error!(error = chain(&error), "client_roots can't be used, the old ones stay"),
        }
        match done {
            Ok(Reloaded::Unchanged) => {}
            Ok(Reloaded::Changed) => tracing::info!("new certificates"),
            Err(error) => tracing::error!(error = chain(&error), "certificates can't be used, the old ones stay"),
        }
    }
}
