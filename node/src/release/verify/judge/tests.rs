//! Policies with several signers and demanded attestations, and real keyless bundles, whole and mutated.

use bytes::Bytes;
use selvage_config::PrivateKey;
use selvage_config::oci::Descriptor;
use selvage_config::signature::{Bundle, PAYLOAD_TYPE, STATEMENT_TYPE};
use selvage_config::snapshot::Revoked;
use serde_json::{Value, json};
use sigstore_verify::trust_root::{SIGSTORE_PRODUCTION_TRUSTED_ROOT, SIGSTORE_STAGING_TRUSTED_ROOT};

use super::fake::{Sigstore, When};
use super::*;

/// Logged in the public-good Rekor 1: with an entry timestamp, without one of an authority.
const LOGGED: &str = include_str!("../../../../tests/data/sigstore/conda-attestation.sigstore.json");
/// Logged in the staging Rekor 2, with a timestamp of an authority.
const LOGGED_2: &str = include_str!("../../../../tests/data/sigstore/conda-attestation-rekor2.sigstore.json");
/// What both are about.
const ABOUT: &str = "sha256:54303491a8418fbed24344b513546182c29b43bf282ceb433af65e2299f9271f";
const PREDICATE: &str = "https://schemas.conda.org/attestations-publish-1.schema.json";
const IDENTITY: &str = "https://github.com/prefix-dev/sigstore-example/.github/workflows/action.yaml@refs/heads/main";
const ISSUER: &str = "https://token.actions.githubusercontent.com";

/// A directory with a policy and what it names.
struct Desk(tempfile::TempDir);

impl Desk {
    fn new(keys: &[(&str, &PrivateKey)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("production.json", SIGSTORE_PRODUCTION_TRUSTED_ROOT);
        write("staging.json", SIGSTORE_STAGING_TRUSTED_ROOT);
        keys.iter().for_each(|(name, key)| write(name, &key.public().to_pem()));
        Self(dir)
    }

    fn terms(&self, policy: &str) -> Terms {
        let path = self.0.path().join("policy.toml");
        std::fs::write(&path, policy).unwrap();
        Policy::load(&path).unwrap().into()
    }
}

fn candidate(bytes: Vec<u8>) -> Candidate {
    Candidate { layer: Descriptor::of(oci::BUNDLE, &bytes), bytes: Bytes::from(bytes) }
}

/// A bundle by `key` over a statement.
#[expect(clippy::needless_pass_by_value, reason = "made where it is handed over")]
fn statement(key: &PrivateKey, predicate_type: &str, subject: Value, predicate: Value) -> Candidate {
    let statement = json!({
        "_type": STATEMENT_TYPE, "subject": [subject], "predicateType": predicate_type, "predicate": predicate,
    });
    let mut envelope = Envelope::new(PAYLOAD_TYPE, statement.to_string().into_bytes());
    envelope.sign(key).unwrap();
    candidate(serde_json::to_vec(&Bundle::of_key(key.public().spki(), envelope)).unwrap())
}

fn signature(key: &PrivateKey, digest: Digest) -> Candidate {
    statement(key, PREDICATE_SIGN, json!({ "digest": { "sha256": digest.hex() } }), json!({}))
}

fn judged(terms: &Terms, digest: Digest, candidates: &[Candidate]) -> Result<Verdict, VerifyError> {
    let mut judge = Judge::new(terms, &"hello".parse().unwrap(), "acme/hello", digest)?;
    for candidate in candidates {
        judge.offer(candidate);
    }
    judge.verdict()
}

/// Why the last of the candidates did not count.
fn why(terms: &Terms, digest: Digest, candidates: &[Candidate]) -> &'static str {
    match judged(terms, digest, candidates).unwrap_err() {
        VerifyError::Untrusted { why, .. } | VerifyError::Short { why, .. } => why.kept.last().unwrap().1.cause(),
        other => panic!("{other:?}"),
    }
}

fn key() -> PrivateKey {
    PrivateKey::generate().unwrap()
}

#[test]
fn a_threshold_counts_different_signers_and_not_signatures() {
    let (a, b, c, digest) = (key(), key(), key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("a.pub", &a), ("b.pub", &b), ("again.pub", &a)]);
    let two = "[[rule]]\nthreshold = 2\nsigners = [{ key = 'a.pub' }, { key = 'b.pub' }, { key = 'again.pub' }]\n";
    let terms = desk.terms(two);
    let verdict =
        judged(&terms, digest, &[signature(&c, digest), signature(&a, digest), signature(&b, digest)]).unwrap();
    assert_eq!((verdict.rule, verdict.proofs.len()), (Some(0), 2));
    for few in [vec![&a], vec![&a, &a], vec![&a, &c], vec![&c, &c]] {
        let offered: Vec<Candidate> = few.iter().map(|key| signature(key, digest)).collect();
        assert!(judged(&terms, digest, &offered).is_err(), "one key under two names is one signer");
    }
}

#[test]
fn the_first_rule_that_covers_an_app_decides_and_without_one_nothing_runs() {
    let (a, b, digest) = (key(), key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("a.pub", &a), ("b.pub", &b)]);
    let of = |apps: &str| {
        let rule = format!("[[rule]]\napps = ['{apps}']\nsigners = [{{ key = 'a.pub' }}]\n");
        desk.terms(&format!("{rule}[[rule]]\nrepositories = ['other/*']\nsigners = [{{ key = 'b.pub' }}]\n"))
    };
    assert!(judged(&of("hel*"), digest, &[signature(&a, digest)]).is_ok());
    assert!(judged(&of("hello"), digest, &[signature(&b, digest)]).is_err());
    let error = judged(&of("bank"), digest, &[signature(&a, digest), signature(&b, digest)]).unwrap_err();
    assert_eq!(error.cause(), "policy");
    let other = of("bank");
    let mut judge = Judge::new(&other, &"hello".parse().unwrap(), "other/hello", digest).unwrap();
    assert!(judge.offer(&signature(&b, digest)));
}

#[test]
fn a_rule_for_one_registry_says_nothing_of_another_one() {
    let (own, upstream, digest) = (key(), key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("own.pub", &own), ("upstream.pub", &upstream)]);
    let terms = desk.terms(
        "registries = ['ghcr', 'quay']\n[[rule]]\nregistry = 'ghcr'\nsigners = [{ key = 'upstream.pub' }]\n\
         [[rule]]\nregistry = 'own'\nsigners = [{ key = 'own.pub' }]\n",
    );
    let app = "hello".parse().unwrap();
    let is_met = |repository: &str, key: &PrivateKey| {
        Judge::new(&terms, &app, repository, digest).map(|mut judge| judge.offer(&signature(key, digest)))
    };
    assert!(is_met("ghcr/acme/hello", &upstream).unwrap() && is_met("acme/hello", &own).unwrap());
    // Neither counts where the other one does, and what comes from a registry without a rule does not run at all.
    assert!(!is_met("ghcr/acme/hello", &own).unwrap() && !is_met("acme/hello", &upstream).unwrap());
    assert_eq!(is_met("quay/acme/hello", &own).unwrap_err().cause(), "policy");
}

#[test]
fn wanted_annotations_must_be_under_the_signature() {
    let (a, digest) = (key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("a.pub", &a)]);
    let terms = desk.terms("[[rule]]\nannotations = { env = 'prod' }\nsigners = [{ key = 'a.pub' }]\n");
    let with = |annotations: Value, digest: Digest| {
        let subject = json!({ "digest": { "sha256": digest.hex() }, "annotations": annotations });
        statement(&a, PREDICATE_SIGN, subject, json!({}))
    };
    assert!(judged(&terms, digest, &[with(json!({ "env": "prod", "more": "x" }), digest)]).is_ok());
    for bad in [json!({}), json!({ "env": "test" }), json!({ "ENV": "prod" })] {
        assert_eq!(why(&terms, digest, &[with(bad, digest)]), "content");
    }
}

#[test]
fn a_demanded_attestation_has_its_own_signer_and_says_what_it_must() {
    let (release, builder, digest) = (key(), key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("release.pub", &release), ("builder.pub", &builder)]);
    let terms = desk.terms(
        "[[rule]]\nsigners = [{ key = 'release.pub' }]\n[[rule.attestations]]\n\
         predicate_type = 'https://slsa.dev/provenance/v1'\nsigners = [{ key = 'builder.pub' }]\n\
         says = { '/runDetails/builder/id' = 'https://builder.example' }\n",
    );
    let provenance = |key: &PrivateKey, builder: &str, digest: Digest| {
        let says = json!({ "runDetails": { "builder": { "id": builder } } });
        statement(key, "https://slsa.dev/provenance/v1", json!({ "digest": { "sha256": digest.hex() } }), says)
    };
    let signed = signature(&release, digest);
    let good = provenance(&builder, "https://builder.example", digest);
    assert_eq!(judged(&terms, digest, &[signed.clone(), good.clone()]).unwrap().proofs.len(), 2);
    // One without the other, in either direction.
    assert!(matches!(
        judged(&terms, digest, std::slice::from_ref(&signed)).unwrap_err(),
        VerifyError::Short { found: 0, .. }
    ));
    assert_eq!(judged(&terms, digest, &[good]).unwrap_err().cause(), "untrusted");
    for (bad, cause) in [
        (provenance(&release, "https://builder.example", digest), "attestation"),
        (provenance(&builder, "https://evil.example", digest), "content"),
        (provenance(&builder, "https://builder.example", Digest::of(b"other")), "subject_mismatch"),
        (signature(&builder, digest), "key"),
    ] {
        assert_eq!(why(&terms, digest, &[signed.clone(), bad]), cause);
    }
}

#[test]
fn a_revoked_key_or_identity_counts_no_more() {
    let (a, digest) = (key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("a.pub", &a)]);
    let policy = desk.terms("[[rule]]\nsigners = [{ key = 'a.pub' }]\n").policy;
    let revoked = Revoked { keys: [a.public().id()].into(), ..Revoked::default() };
    assert_eq!(why(&Terms::new(policy, revoked), digest, &[signature(&a, digest)]), "revoked");
    let keyless = Keyless::new();
    let identities = Revoked { identities: [IDENTITY.to_owned()].into(), ..Revoked::default() };
    let terms = Terms::new(keyless.terms.policy.clone(), identities);
    assert_eq!(why(&terms, about(), &[keyless.signed(), candidate(LOGGED.into())]), "revoked");
}

fn about() -> Digest {
    ABOUT.parse().unwrap()
}

/// A policy that demands the attestation of the test data besides a signature.
struct Keyless {
    desk: Desk,
    release: PrivateKey,
    terms: Terms,
}

impl Keyless {
    fn new() -> Self {
        Self::with(&format!("identity = '{IDENTITY}', issuer = '{ISSUER}', trusted_root = 'production.json'"))
    }

    fn with(signer: &str) -> Self {
        let release = key();
        let desk = Desk::new(&[("release.pub", &release)]);
        let terms = desk.terms(&format!(
            "[[rule]]\nsigners = [{{ key = 'release.pub' }}]\n[[rule.attestations]]\npredicate_type = '{PREDICATE}'\n\
             signers = [{{ {signer} }}]\n"
        ));
        Self { desk, release, terms }
    }

    fn signed(&self) -> Candidate {
        signature(&self.release, about())
    }

    /// What becomes of a bundle after `change`.
    fn changed(&self, bundle: &str, change: impl FnOnce(&mut Value)) -> &'static str {
        let mut document: Value = serde_json::from_str(bundle).unwrap();
        change(&mut document);
        why(&self.terms, about(), &[self.signed(), candidate(document.to_string().into_bytes())])
    }
}

type Change<'c> = Box<dyn Fn(&mut Value) + 'c>;

fn rekor_2() -> Keyless {
    Keyless::with("identity = 'jku@goto.fi', issuer = 'https://github.com/login/oauth', trusted_root = 'staging.json'")
}

#[test]
fn a_certificate_with_a_log_entry_of_rekor_1_counts() {
    let keyless = Keyless::new();
    let verdict = judged(&keyless.terms, about(), &[keyless.signed(), candidate(LOGGED.into())]).unwrap();
    let proof = &verdict.proofs[1];
    assert_eq!((proof.identity.as_deref(), proof.issuer.as_deref()), (Some(IDENTITY), Some(ISSUER)));
    assert!(proof.log && proof.signed_at.is_some() && proof.key.is_none());
}

#[test]
fn a_certificate_with_a_log_entry_of_rekor_2_and_a_timestamp_counts() {
    let keyless = rekor_2();
    let verdict = judged(&keyless.terms, about(), &[keyless.signed(), candidate(LOGGED_2.into())]).unwrap();
    assert!(verdict.proofs[1].log && verdict.proofs[1].signed_at.as_ref().unwrap().starts_with("2026-05-26"));
}

#[test]
fn a_wrong_identity_issuer_or_look_alike_is_refused() {
    let root = "trusted_root = 'production.json'";
    let refused = [
        format!("identity = '{IDENTITY}x', issuer = '{ISSUER}', {root}"),
        format!("identity = '{IDENTITY}', issuer = 'https://accounts.example', {root}"),
        format!("identity_pattern = '^https://github\\.com/prefix-dev/sigstore$', issuer = '{ISSUER}', {root}"),
        format!("identity_pattern = '^prefix-dev$', issuer_pattern = '^https://.*$', {root}"),
    ];
    for signer in refused {
        let keyless = Keyless::with(&signer);
        assert_eq!(keyless.changed(LOGGED, |_| {}), "identity", "{signer}");
    }
    let pattern = "^https://github\\.com/prefix-dev/sigstore-example/\\.github/workflows/[a-z.]+@refs/heads/main$";
    let keyless = Keyless::with(&format!("identity_pattern = '{pattern}', issuer = '{ISSUER}', {root}"));
    assert!(judged(&keyless.terms, about(), &[keyless.signed(), candidate(LOGGED.into())]).is_ok());
}

#[test]
fn a_chain_to_an_authority_that_is_not_trusted_is_refused() {
    let keyless =
        Keyless::with(&format!("identity = '{IDENTITY}', issuer = '{ISSUER}', trusted_root = 'staging.json'"));
    assert!(matches!(keyless.changed(LOGGED, |_| {}), "certificate" | "tlog_inconsistent" | "time"));
}

#[test]
fn what_the_log_says_must_be_about_this_signature() {
    let keyless = Keyless::new();
    let entry = "/verificationMaterial/tlogEntries/0";
    let other: Value = serde_json::from_str(LOGGED_2).unwrap();
    let at = |document: &mut Value, pointer: &str, value: Value| *document.pointer_mut(pointer).unwrap() = value;
    let without = |document: &mut Value, pointer: &str, name: &str| {
        document.pointer_mut(pointer).unwrap().as_object_mut().unwrap().remove(name).unwrap();
    };
    let time: u64 = serde_json::from_str::<Value>(LOGGED)
        .unwrap()
        .pointer(&format!("{entry}/integratedTime"))
        .unwrap()
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let changes: Vec<(&str, Change<'_>)> = vec![
        ("no entry", Box::new(|d| at(d, "/verificationMaterial/tlogEntries", json!([])))),
        ("no promise", Box::new(|d| without(d, entry, "inclusionPromise"))),
        ("no proof", Box::new(|d| without(d, entry, "inclusionProof"))),
        ("another time", Box::new(|d| at(d, &format!("{entry}/integratedTime"), json!((time + 5).to_string())))),
        ("another entry", Box::new(|d| at(d, entry, other.pointer(entry).unwrap().clone()))),
        (
            "another's proof",
            Box::new(|d| {
                let proof = format!("{entry}/inclusionProof");
                at(d, &proof, other.pointer(&proof).unwrap().clone());
            }),
        ),
        (
            "another's body",
            Box::new(|d| {
                let body = format!("{entry}/canonicalizedBody");
                at(d, &body, other.pointer(&body).unwrap().clone());
            }),
        ),
        (
            "another certificate",
            Box::new(|d| {
                let certificate = "/verificationMaterial/certificate/rawBytes";
                at(d, certificate, other.pointer(certificate).unwrap().clone());
            }),
        ),
    ];
    for (what, change) in changes {
        let cause = keyless.changed(LOGGED, |document| change(document));
        assert!(matches!(cause, "tlog_inconsistent" | "time" | "malformed" | "identity" | "key"), "{what}: {cause}");
    }
}

#[test]
fn a_rekor_2_entry_without_its_timestamp_or_with_another_proof_is_refused() {
    let keyless = rekor_2();
    let no_time =
        keyless.changed(LOGGED_2, |document| document["verificationMaterial"]["timestampVerificationData"] = json!({}));
    assert!(matches!(no_time, "time" | "malformed"), "{no_time}");
    let other: Value = serde_json::from_str(LOGGED).unwrap();
    let proof = "/verificationMaterial/tlogEntries/0/inclusionProof";
    let forged = keyless.changed(LOGGED_2, |d| *d.pointer_mut(proof).unwrap() = other.pointer(proof).unwrap().clone());
    assert!(matches!(forged, "tlog_inconsistent" | "malformed"), "{forged}");
    let _ = &keyless.desk;
}

#[test]
fn a_timestamp_by_an_authority_that_is_not_trusted_or_was_not_then_or_was_changed_is_refused() {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    let keyless = rekor_2();
    assert!(judged(&keyless.terms, about(), &[keyless.signed(), candidate(LOGGED_2.into())]).is_ok());
    let with_root = |change: &dyn Fn(&mut Value)| {
        let mut root: Value = serde_json::from_str(SIGSTORE_STAGING_TRUSTED_ROOT).unwrap();
        change(&mut root["timestampAuthorities"]);
        let mut keyless = rekor_2();
        let path = |name: &str| keyless.desk.0.path().join(name);
        std::fs::write(path("staging.json"), root.to_string()).unwrap();
        keyless.terms = Policy::load(&path("policy.toml")).unwrap().into();
        keyless.changed(LOGGED_2, |_| {})
    };
    let of_another_time = |authorities: &mut Value| {
        for authority in authorities.as_array_mut().unwrap() {
            authority["validFor"] = json!({ "start": "2001-01-01T00:00:00Z", "end": "2002-01-01T00:00:00Z" });
        }
    };
    assert_eq!(with_root(&|authorities| *authorities = json!([])), "time");
    assert_eq!(with_root(&of_another_time), "time");
    let token = "/verificationMaterial/timestampVerificationData/rfc3161Timestamps/0/signedTimestamp";
    let whole = serde_json::from_str::<Value>(LOGGED_2).unwrap().pointer(token).unwrap().as_str().unwrap().to_owned();
    let bytes = STANDARD.decode(whole).unwrap();
    // What it is over, the signature's hash; when, whose digits follow its tag; and the authority's signature, at the end.
    let signature = "/dsseEnvelope/signatures/0/sig";
    let over =
        serde_json::from_str::<Value>(LOGGED_2).unwrap().pointer(signature).unwrap().as_str().unwrap().to_owned();
    let over = Digest::of(&STANDARD.decode(over).unwrap());
    let at = |part: &[u8]| bytes.windows(part.len()).position(|window| window == part).unwrap();
    for place in [at(over.as_bytes()), at(b"20260526") + 9, bytes.len() - 1] {
        let mut changed = bytes.clone();
        changed[place] ^= 1;
        let cause = keyless.changed(LOGGED_2, |d| *d.pointer_mut(token).unwrap() = STANDARD.encode(&changed).into());
        assert!(matches!(cause, "time" | "malformed"), "{place}: {cause}");
    }
}

#[test]
fn a_bundle_of_an_older_version_is_refused_whatever_it_holds() {
    let keyless = Keyless::new();
    for version in
        ["application/vnd.dev.sigstore.bundle+json;version=0.1", "application/vnd.dev.sigstore.bundle.v0.2+json"]
    {
        assert_eq!(keyless.changed(LOGGED, |document| document["mediaType"] = version.into()), "form");
    }
}

#[test]
fn a_changed_statement_is_not_what_was_signed() {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    let keyless = Keyless::new();
    let cause = keyless.changed(LOGGED, |document| {
        let payload = &mut document["dsseEnvelope"]["payload"];
        let text = String::from_utf8(STANDARD.decode(payload.as_str().unwrap()).unwrap()).unwrap();
        *payload = STANDARD.encode(text.replacen("conda", "Conda", 1)).into();
    });
    assert!(matches!(cause, "key" | "tlog_inconsistent"), "{cause}");
    // The same bundle beside another artifact.
    let other = Digest::of(b"other");
    assert_eq!(why(&keyless.terms, other, &[candidate(LOGGED.into())]), "subject_mismatch");
}

#[test]
fn an_attestation_in_a_trusted_name_is_no_signature() {
    let desk = Desk::new(&[]);
    let signer = format!("identity = '{IDENTITY}', issuer = '{ISSUER}', trusted_root = 'production.json'");
    let terms = desk.terms(&format!("[[rule]]\nsigners = [{{ {signer} }}]\n"));
    assert_eq!(why(&terms, about(), &[candidate(LOGGED.into())]), "attestation");
    assert_eq!(why(&terms, about(), &[signature(&key(), about())]), "kind");
}

/// A fleet that trusts one name of an authority of its own.
fn own() -> (Sigstore, Desk, Terms) {
    let (sigstore, desk) = (Sigstore::new(), Desk::new(&[]));
    std::fs::write(desk.0.path().join("own.json"), sigstore.trusted_root()).unwrap();
    let signer = format!("identity = '{IDENTITY}', issuer = '{ISSUER}', trusted_root = 'own.json'");
    let terms = desk.terms(&format!("[[rule]]\nsigners = [{{ {signer} }}]\n"));
    (sigstore, desk, terms)
}

fn said(predicate_type: &str, digest: Digest) -> Value {
    let subject = json!([{ "digest": { "sha256": digest.hex() } }]);
    json!({ "_type": STATEMENT_TYPE, "subject": subject, "predicateType": predicate_type, "predicate": {} })
}

#[test]
fn a_keyless_signature_counts_in_the_trusted_name_alone() {
    let ((sigstore, _desk, terms), digest) = (own(), Digest::of(b"artifact"));
    let by = |identity: &str, issuer: &str| {
        let bundle = sigstore.bundle(&said(PREDICATE_SIGN, digest), (identity, issuer), When::HOUR_AGO);
        candidate(bundle.to_string().into_bytes())
    };
    let verdict = judged(&terms, digest, &[by(IDENTITY, ISSUER)]).unwrap();
    assert!(verdict.proofs[0].log && verdict.proofs[0].identity.as_deref() == Some(IDENTITY));
    assert_eq!(why(&terms, digest, &[by("https://github.com/evil", ISSUER)]), "identity");
    assert_eq!(why(&terms, digest, &[by(IDENTITY, "https://evil.example")]), "identity");
    // Another authority with the same names.
    let bundle = Sigstore::new().bundle(&said(PREDICATE_SIGN, digest), (IDENTITY, ISSUER), When::HOUR_AGO);
    let cause = why(&terms, digest, &[candidate(bundle.to_string().into_bytes())]);
    assert!(matches!(cause, "certificate" | "tlog_inconsistent" | "time"), "{cause}");
}

#[test]
fn a_signature_that_was_logged_after_its_certificate_ended_is_refused() {
    let ((sigstore, _desk, terms), digest) = (own(), Digest::of(b"artifact"));
    // A stolen key of an hour ago, used now; and a time that has not come.
    for when in [When { issued: -3_600, logged: -10 }, When { issued: 3_000, logged: 3_010 }] {
        let bundle = sigstore.bundle(&said(PREDICATE_SIGN, digest), (IDENTITY, ISSUER), when);
        let cause = why(&terms, digest, &[candidate(bundle.to_string().into_bytes())]);
        assert!(matches!(cause, "certificate" | "time" | "tlog_inconsistent"), "{cause}");
    }
}

/// A clock that is behind and a trusted root that begins later are the same: here it is the root that is moved.
#[test]
fn while_the_clock_shows_a_time_before_the_trusted_root_nothing_keyless_counts_and_it_is_named() {
    let ((sigstore, desk, _), digest, a) = (own(), Digest::of(b"artifact"), key());
    let bundle = sigstore.bundle(&said(PREDICATE_SIGN, digest), (IDENTITY, ISSUER), When::HOUR_AGO);
    let offered = [candidate(bundle.to_string().into_bytes()), signature(&a, digest)];
    std::fs::write(desk.0.path().join("a.pub"), a.public().to_pem()).unwrap();
    let from = |authority: &str, log: &str, rule: &str| {
        let mut root: Value = serde_json::from_str(&sigstore.trusted_root()).unwrap();
        root["certificateAuthorities"][0]["validFor"]["start"] = authority.into();
        root["tlogs"][0]["publicKey"]["validFor"]["start"] = log.into();
        std::fs::write(desk.0.path().join("later.json"), root.to_string()).unwrap();
        desk.terms(&format!("[[rule]]\nsigners = [{{ {rule}, trusted_root = 'later.json' }}]\n"))
    };
    let (past, future) = ("2020-01-01T00:00:00Z", "2200-01-01T00:00:00Z");
    let keyless = format!("identity = '{IDENTITY}', issuer = '{ISSUER}'");
    assert!(judged(&from(past, past, &keyless), digest, &offered).is_ok());
    for (authority, log) in [(future, past), (past, future), (future, future)] {
        assert_eq!(why(&from(authority, log, &keyless), digest, &offered[..1]), "clock", "{authority} {log}");
    }
    // A key whose log counts is judged by the log's times, one without a log by none.
    let logged = from(past, future, "key = 'a.pub', log = true");
    let error = judged(&logged, digest, &offered[1..]).unwrap_err();
    assert_eq!(error.cause(), "untrusted");
    assert_eq!(why(&logged, digest, &offered[1..]), "clock");
    assert!(judged(&from(future, future, "key = 'a.pub'"), digest, &offered[1..]).is_ok());
    // Of two authorities one that has begun is enough: the next one may be told before its time.
    let mut root: Value = serde_json::from_str(&sigstore.trusted_root()).unwrap();
    let mut next: Value = serde_json::from_str(&Sigstore::new().trusted_root()).unwrap();
    next["certificateAuthorities"][0]["validFor"]["start"] = future.into();
    root["certificateAuthorities"].as_array_mut().unwrap().push(next["certificateAuthorities"][0].clone());
    std::fs::write(desk.0.path().join("both.json"), root.to_string()).unwrap();
    let both = desk.terms(&format!("[[rule]]\nsigners = [{{ {keyless}, trusted_root = 'both.json' }}]\n"));
    assert!(judged(&both, digest, &offered[..1]).is_ok());
}

#[test]
fn the_public_parts_of_a_signature_are_worth_nothing_beside_another_artifact() {
    let ((sigstore, _desk, terms), good, evil) = (own(), Digest::of(b"good"), Digest::of(b"evil"));
    let of = |digest| sigstore.bundle(&said(PREDICATE_SIGN, digest), (IDENTITY, ISSUER), When::HOUR_AGO);
    let (mine, stranger) =
        (of(good), Sigstore::new().bundle(&said(PREDICATE_SIGN, evil), (IDENTITY, ISSUER), When::HOUR_AGO));
    // As it is; with the envelope of somebody else; with the payload changed under the signature.
    assert_eq!(why(&terms, evil, &[candidate(mine.to_string().into_bytes())]), "subject_mismatch");
    let mut mixed = mine.clone();
    mixed["dsseEnvelope"] = stranger["dsseEnvelope"].clone();
    let cause = why(&terms, evil, &[candidate(mixed.to_string().into_bytes())]);
    assert!(matches!(cause, "key" | "tlog_inconsistent"), "{cause}");
    let mut payload = mine.clone();
    payload["dsseEnvelope"]["payload"] = stranger["dsseEnvelope"]["payload"].clone();
    let cause = why(&terms, evil, &[candidate(payload.to_string().into_bytes())]);
    assert!(matches!(cause, "key" | "tlog_inconsistent"), "{cause}");
    // The log entry of another signature by the same name.
    let mut entry = mine;
    entry["verificationMaterial"]["tlogEntries"] = of(good)["verificationMaterial"]["tlogEntries"].clone();
    assert_eq!(why(&terms, good, &[candidate(entry.to_string().into_bytes())]), "tlog_inconsistent");
}

#[test]
fn a_certificate_that_no_certificate_log_has_is_refused_unless_the_policy_says_so() {
    let ((sigstore, desk, terms), digest) = (own(), Digest::of(b"artifact"));
    let mut root: Value = serde_json::from_str(&sigstore.trusted_root()).unwrap();
    root["ctlogs"] = serde_json::from_str::<Value>(&Sigstore::new().trusted_root()).unwrap()["ctlogs"].clone();
    std::fs::write(desk.0.path().join("other.json"), root.to_string()).unwrap();
    let with = |more: &str| {
        let signer = format!("identity = '{IDENTITY}', issuer = '{ISSUER}', trusted_root = 'other.json'{more}");
        desk.terms(&format!("[[rule]]\nsigners = [{{ {signer} }}]\n"))
    };
    let bundle = sigstore.bundle(&said(PREDICATE_SIGN, digest), (IDENTITY, ISSUER), When::HOUR_AGO);
    let offered = [candidate(bundle.to_string().into_bytes())];
    assert!(judged(&terms, digest, &offered).is_ok());
    assert_eq!(why(&with(""), digest, &offered), "certificate");
    assert!(judged(&with(", certificate_log = false"), digest, &offered).is_ok());
}

#[test]
fn a_key_whose_log_counts_needs_an_entry() {
    let (a, digest) = (key(), Digest::of(b"artifact"));
    let desk = Desk::new(&[("a.pub", &a)]);
    let terms = desk.terms("[[rule]]\nsigners = [{ key = 'a.pub', log = true, trusted_root = 'production.json' }]\n");
    let cause = why(&terms, digest, &[signature(&a, digest)]);
    assert!(matches!(cause, "tlog_inconsistent" | "malformed" | "time"), "{cause}");
}

/// docs/PROMISES.md: at most 5 ms of CPU for one verification, and a thousand a second remembered. The bounds of this
/// test are wider, for a build that is not optimised.
#[test]
#[expect(clippy::print_stderr, reason = "the figures")]
fn a_verification_costs_milliseconds_and_a_remembered_one_microseconds() {
    let keyless = Keyless::new();
    let offered = [keyless.signed(), candidate(LOGGED.into())];
    let each = |rounds: u32, act: &dyn Fn()| {
        let began = cpu_time::ThreadTime::now();
        (0..rounds).for_each(|_| act());
        began.elapsed() / rounds
    };
    let by_key = each(50, &|| drop(judged(&keyless.terms, about(), &offered[..1])));
    let both = each(20, &|| drop(judged(&keyless.terms, about(), &offered).unwrap()));
    let head = crate::release::verify::tests::release().head;
    let terms: Terms = Policy::LocalFiles.into();
    let remembered =
        each(200, &|| drop(crate::release::verify::trust(&head, &"hello".parse().unwrap(), &terms).unwrap()));
    eprintln!("CPU of a key's signature {by_key:?}, with a keyless attestation {both:?}, remembered {remembered:?}");
    assert!(both.as_millis() < 100 && remembered.as_millis() < 10, "{both:?}, {remembered:?}");
}
