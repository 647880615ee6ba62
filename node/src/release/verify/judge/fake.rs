//! A certificate authority, a certificate log and a transparency log of this test: what Fulcio and Rekor 1 are to others.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use selvage_config::signature::{PAYLOAD_TYPE, pre_authentication_encoding};
use selvage_config::{Digest, PrivateKey};
use serde_json::{Value, json};
use time::OffsetDateTime;

/// The log's name, and the tree's in checkpoints.
const NAME: &str = "rekor.test";
const ORIGIN: &str = "rekor.test - 1";

/// Authority, certificate log and transparency log.
pub(super) struct Sigstore {
    authority: KeyPair,
    params: CertificateParams,
    certificate: Vec<u8>,
    certificate_log: PrivateKey,
    log: PrivateKey,
}

/// What a log has.
#[derive(Clone, Copy)]
pub(super) struct When {
    /// When the certificate becomes valid, seconds from now. It is valid for ten minutes.
    pub(super) issued: i64,
    /// When the entry was made, seconds from now.
    pub(super) logged: i64,
}

impl When {
    pub(super) const HOUR_AGO: Self = Self { issued: -3_600, logged: -3_590 };
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(now() + seconds).unwrap()
}

/// The first element within a DER sequence: of a certificate, what is signed.
fn first_element(der: &[u8]) -> &[u8] {
    let header = |bytes: &[u8]| match bytes[1] {
        0x81 => (3, usize::from(bytes[2])),
        0x82 => (4, usize::from(bytes[2]) << 8 | usize::from(bytes[3])),
        short => (2, usize::from(short)),
    };
    let inner = &der[header(der).0..];
    let (head, length) = header(inner);
    &inner[..head + length]
}

fn utf8_string(text: &str) -> Vec<u8> {
    [&[0x0c, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat()
}

impl Sigstore {
    pub(super) fn new() -> Self {
        let authority = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "fulcio.test");
        (params.not_before, params.not_after) = (at(-86_400), at(86_400));
        let certificate = params.self_signed(&authority).unwrap().der().to_vec();
        let (certificate_log, log) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        Self { authority, params, certificate, certificate_log, log }
    }

    /// `trusted_root.json`.
    pub(super) fn trusted_root(&self) -> String {
        let valid = json!({ "start": "2020-01-01T00:00:00Z" });
        let log = |key: &PrivateKey, url: &str| {
            let spki = key.public().spki().to_vec();
            json!({
                "baseUrl": url, "hashAlgorithm": "SHA2_256",
                "publicKey": { "rawBytes": STANDARD.encode(&spki), "keyDetails": "PKIX_ECDSA_P256_SHA_256", "validFor": valid },
                "logId": { "keyId": STANDARD.encode(Digest::of(&spki).as_bytes()) },
            })
        };
        json!({
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(&self.log, "https://rekor.test")],
            "ctlogs": [log(&self.certificate_log, "https://ct.test")],
            "certificateAuthorities": [{
                "subject": { "organization": "test", "commonName": "fulcio.test" }, "uri": "https://fulcio.test",
                "certChain": { "certificates": [{ "rawBytes": STANDARD.encode(&self.certificate) }] }, "validFor": valid,
            }],
            "timestampAuthorities": [],
        })
        .to_string()
    }

    /// A certificate for a name, with the certificate log's word that it has it.
    fn certificate(&self, key: &KeyPair, identity: &str, issuer: &str, issued: i64) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from(vec![1, 2, 3, 4]));
        params.subject_alt_names = vec![SanType::URI(identity.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (at(issued), at(issued + 600));
        // Fulcio's issuer, version 2.
        let oid = [1, 3, 6, 1, 4, 1, 57_264, 1, 8];
        params.custom_extensions = vec![CustomExtension::from_oid_content(&oid, utf8_string(issuer))];
        let ca = Issuer::from_params(&self.params, &self.authority);
        let before = params.signed_by(key, &ca).unwrap();
        let timestamps = self.timestamps(first_element(before.der()), now() + issued);
        params
            .custom_extensions
            .push(CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 11_129, 2, 4, 2], timestamps));
        params.signed_by(key, &ca).unwrap().der().to_vec()
    }

    /// A list of one signed certificate timestamp (RFC 6962 3.2, 3.3).
    fn timestamps(&self, tbs: &[u8], seconds: i64) -> Vec<u8> {
        use rcgen::PublicKeyData as _;
        let ms = u64::try_from(seconds * 1_000).unwrap().to_be_bytes();
        let issuer = Digest::of(&self.authority.subject_public_key_info());
        let length = u32::try_from(tbs.len()).unwrap().to_be_bytes();
        let covered = [&[0, 0][..], &ms, &[0, 1], issuer.as_bytes(), &length[1..], tbs, &[0, 0]].concat();
        let signature = self.certificate_log.sign(&covered).unwrap();
        let log_id = Digest::of(self.certificate_log.public().spki());
        let sized = |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
        let one = [&[0][..], log_id.as_bytes(), &ms, &[0, 0, 4, 3], &sized(&signature)].concat();
        let list = sized(&sized(&one));
        let length = u8::try_from(list.len()).unwrap();
        let head: &[u8] = if length < 0x80 { &[0x04, length] } else { &[0x04, 0x81, length] };
        [head, &list].concat()
    }

    /// A bundle as cosign 3 makes it without a key: a statement signed by a fresh key, its certificate, and its entry.
    pub(super) fn bundle(&self, statement: &Value, (identity, issuer): (&str, &str), when: When) -> Value {
        let key = PrivateKey::generate().unwrap();
        let pair = KeyPair::from_pem(&key.to_pem()).unwrap();
        let certificate = self.certificate(&pair, identity, issuer, when.issued);
        let payload = statement.to_string().into_bytes();
        let signature = STANDARD.encode(key.sign(&pre_authentication_encoding(PAYLOAD_TYPE, &payload)).unwrap());
        let pem = selvage_config::key::pem("CERTIFICATE", &certificate);
        let body = json!({
            "apiVersion": "0.0.1", "kind": "dsse",
            "spec": {
                "envelopeHash": { "algorithm": "sha256", "value": Digest::of(b"envelope").hex() },
                "payloadHash": { "algorithm": "sha256", "value": Digest::of(&payload).hex() },
                "signatures": [{ "signature": signature, "verifier": STANDARD.encode(pem) }],
            },
        });
        json!({
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": { "rawBytes": STANDARD.encode(certificate) },
                "tlogEntries": [self.entry(&body.to_string(), now() + when.logged)],
            },
            "dsseEnvelope": {
                "payload": STANDARD.encode(payload), "payloadType": PAYLOAD_TYPE, "signatures": [{ "sig": signature }],
            },
        })
    }

    /// The one entry of a log: with the log's promise, and a proof that is empty because there is no other.
    fn entry(&self, body: &str, logged: i64) -> Value {
        let spki = self.log.public().spki().to_vec();
        let id = Digest::of(&spki);
        let promised = format!(
            r#"{{"body":"{}","integratedTime":{logged},"logID":"{}","logIndex":0}}"#,
            STANDARD.encode(body),
            id.hex()
        );
        let root = Digest::of(&[&[0], body.as_bytes()].concat());
        let note = format!("{ORIGIN}\n1\n{}\n", STANDARD.encode(root.as_bytes()));
        let signed = [&id.as_bytes()[..4], &self.log.sign(note.as_bytes()).unwrap()].concat();
        json!({
            "logIndex": "0", "logId": { "keyId": STANDARD.encode(id.as_bytes()) },
            "kindVersion": { "kind": "dsse", "version": "0.0.1" }, "integratedTime": logged.to_string(),
            "inclusionPromise": { "signedEntryTimestamp": STANDARD.encode(self.log.sign(promised.as_bytes()).unwrap()) },
            "inclusionProof": {
                "logIndex": "0", "rootHash": STANDARD.encode(root.as_bytes()), "treeSize": "1", "hashes": [],
                "checkpoint": { "envelope": format!("{note}\n\u{2014} {NAME} {}\n", STANDARD.encode(signed)) },
            },
            "canonicalizedBody": STANDARD.encode(body),
        })
    }
}
