//! Whether a request came by a connection that may carry one for its host, and what its client's certificate is.
//!
//! Names on one listener may differ in what is spoken and in whose certificates count. A connection that was made for one
//! of them can't be used for another where that would go round a rule: 421 tells the client to make another one (RFC 9110
//! 15.5.20).

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::uri::Authority;
use http::{HeaderName, HeaderValue};
use rustls::pki_types::CertificateDer;
use selvage_certs::{NameRule, NameRules};
use selvage_config::Digest;
use selvage_config::node::Alpn;

use crate::fault::{ClientFault, Fault};
use crate::request::{Protocol, Request};

/// The client's certificate (RFC 9440 2.2).
const CLIENT_CERT: HeaderName = HeaderName::from_static("client-cert");
/// Its SHA-256, as openssl tells a fingerprint, but in lower case and without colons.
const FINGERPRINT: HeaderName = HeaderName::from_static("selvage-client-cert-sha256");

/// What the handshake of a connection settled.
#[derive(Debug)]
pub(crate) struct Session {
    rule: Option<Arc<NameRule>>,
    /// The two fields of a certificate that was verified.
    certificate: Option<[(HeaderName, HeaderValue); 2]>,
}

impl Session {
    /// The session of a connection under `rule`, whose client showed `certificate`.
    pub(crate) fn new(rule: Option<Arc<NameRule>>, certificate: Option<&CertificateDer<'_>>) -> Self {
        let certificate = certificate.and_then(|der| {
            let whole = HeaderValue::try_from(format!(":{}:", STANDARD.encode(der))).ok()?;
            let fingerprint = HeaderValue::try_from(Digest::of(der).hex()).ok()?;
            Some([(CLIENT_CERT, whole), (FINGERPRINT, fingerprint)])
        });
        Self { rule, certificate }
    }

    /// Whether there is HTTP/3 for its name.
    pub(crate) fn has_h3(&self) -> bool {
        self.rule.as_ref().is_none_or(|rule| rule.speaks(Alpn::H3))
    }
}

/// Checks a request for `authority`, and tells of its client's certificate. Fields that came in must have been stripped.
///
/// # Errors
/// [`ClientFault::Misdirected`].
pub(crate) fn check(rules: &NameRules, request: &mut Request, authority: &Authority) -> Result<(), Fault> {
    if rules.is_empty() {
        return Ok(());
    }
    let session = request.http.extensions_mut().remove::<Arc<Session>>();
    let wanted = rules.of(&authority.host().to_ascii_lowercase()).map(AsRef::as_ref);
    let alpn = match request.protocol {
        Protocol::H1 => Alpn::H1,
        Protocol::H2 => Alpn::H2,
        Protocol::H3 => Alpn::H3,
    };
    let may = match &session {
        Some(session) => NameRules::may_carry(session.rule.as_deref(), alpn, wanted),
        // QUIC shakes hands only for names that ask for nothing.
        None if alpn == Alpn::H3 => NameRules::may_carry(None, alpn, wanted),
        None => NameRules::may_be_plain(wanted),
    };
    if !may {
        return Err(Fault::Client(ClientFault::Misdirected));
    }
    for (name, value) in session.iter().filter_map(|session| session.certificate.as_ref()).flatten() {
        request.http.headers_mut().insert(name.clone(), value.clone());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use selvage_certs::Authority as CertificateAuthority;
    use selvage_config::node::TlsName;

    use super::*;
    use crate::request::empty;

    fn rules(dir: &tempfile::TempDir) -> NameRules {
        let roots = dir.path().join("clients.pem");
        std::fs::write(&roots, CertificateAuthority::create("clients").unwrap().certificate_pem()).unwrap();
        let text = format!("name = 'safe.test'\nclient_certificates = 'require'\nclient_roots = '{}'", roots.display());
        NameRules::load(&[toml::from_str::<TlsName>(&text).unwrap()]).unwrap()
    }

    fn ask(
        rules: &NameRules,
        session: Option<Session>,
        protocol: Protocol,
        host: &str,
    ) -> (Result<(), Fault>, Request) {
        let mut request = Request {
            http: http::Request::builder().uri("/").body(empty()).unwrap(),
            client: "192.0.2.7:4711".parse().unwrap(),
            protocol,
            secure: session.is_some(),
            arrived: Instant::now(),
        };
        if let Some(session) = session {
            request.http.extensions_mut().insert(Arc::new(session));
        }
        let checked = check(rules, &mut request, &host.parse().unwrap());
        (checked, request)
    }

    #[test]
    fn a_request_that_would_go_round_a_rule_is_misdirected() {
        let dir = tempfile::tempdir().unwrap();
        let rules = rules(&dir);
        let session = |name: &str| Some(Session::new(rules.of(name).cloned(), None));
        let misdirected = Err(Fault::Client(ClientFault::Misdirected));
        for (session, protocol, host, want) in [
            (session("safe.test"), Protocol::H1, "safe.test", Ok(())),
            (session("safe.test"), Protocol::H2, "SAFE.test:8443", Ok(())),
            (session("any.test"), Protocol::H2, "safe.test", misdirected.clone()),
            (session("any.test"), Protocol::H1, "Safe.Test.", misdirected.clone()),
            (session("safe.test"), Protocol::H2, "any.test", misdirected.clone()),
            (None, Protocol::H1, "safe.test", misdirected.clone()),
            (None, Protocol::H3, "safe.test", misdirected),
            (None, Protocol::H3, "any.test", Ok(())),
            (None, Protocol::H1, "any.test", Ok(())),
        ] {
            assert_eq!(ask(&rules, session, protocol, host).0, want, "{protocol:?} {host}");
        }
    }

    #[test]
    fn a_guest_is_told_of_a_certificate_that_was_verified() {
        let dir = tempfile::tempdir().unwrap();
        let rules = rules(&dir);
        let der = CertificateDer::from(vec![1, 2, 3]);
        let session = Session::new(rules.of("safe.test").cloned(), Some(&der));
        assert!(!session.has_h3());
        let (checked, request) = ask(&rules, Some(session), Protocol::H2, "safe.test");
        checked.unwrap();
        assert_eq!(request.http.headers()[CLIENT_CERT], ":AQID:");
        let sha256 = "039058c6f2c0cb492c533b0a4d14ef77cc0f78abccced5287d84a1a2011cfb81";
        assert_eq!(request.http.headers()[FINGERPRINT], sha256);
    }
}
