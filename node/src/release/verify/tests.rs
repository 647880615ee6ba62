//! Every way in which a release is not what a trusted key signed.

use std::error::Error as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _};
use selvage_config::oci::Index;
use selvage_config::signature::{
    Bundle, Envelope, EnvelopeSignature, PAYLOAD_TYPE, SIMPLE_SIGNING_TYPE, Statement, pre_authentication_encoding,
};

use super::*;
use crate::release::fetch::Candidate;

/// A minimal component: the preamble and nothing.
const CODE: &[u8] = b"\0asm\x0d\0\x01\0";

/// A key pair as `cosign generate-key-pair` makes it.
pub(crate) struct Signer(EcdsaKeyPair);

impl Signer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref(), &random).unwrap())
    }

    fn spki(&self) -> Vec<u8> {
        let mut spki = p256_prefix().to_vec();
        spki.extend_from_slice(&self.0.public_key().as_ref()[1..]);
        spki
    }

    pub(crate) fn key(&self) -> PublicKey {
        PublicKey::from_pem(pem(&self.spki()).as_bytes()).unwrap()
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.0.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }

    /// A bundle around `statement`, as cosign makes it.
    fn bundle(&self, statement: &Statement, payload_type: &str) -> Bundle {
        let payload = serde_json::to_vec(statement).unwrap();
        let sig = self.sign(&pre_authentication_encoding(payload_type, &payload));
        let signatures = vec![EnvelopeSignature { sig, keyid: String::new() }];
        Bundle::of_key(&self.spki(), Envelope { payload, payload_type: payload_type.into(), signatures })
    }

    pub(crate) fn signature(&self, digest: Digest) -> Candidate {
        candidate(&self.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE))
    }

    fn legacy(&self, digest: Digest, kind: &str) -> Candidate {
        let payload = serde_json::json!({
            "critical": {
                "identity": {"docker-reference": "registry.example/acme/hello"},
                "image": {"docker-manifest-digest": digest},
                "type": kind,
            },
            "optional": null,
        });
        let bytes = Bytes::from(payload.to_string());
        let mut layer = Descriptor::of(oci::SIMPLE_SIGNING, &bytes);
        layer.annotations.insert(oci::COSIGN_SIGNATURE.into(), STANDARD.encode(self.sign(&bytes)));
        Candidate { layer, bytes }
    }
}

/// The first bytes of a P-256 key, written down independently of the reader.
fn p256_prefix() -> Vec<u8> {
    hex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
}

fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
}

fn pem(spki: &[u8]) -> String {
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(spki))
}

fn candidate(bundle: &Bundle) -> Candidate {
    let bytes = Bytes::from(serde_json::to_vec(bundle).unwrap());
    Candidate { layer: Descriptor::of(oci::BUNDLE, &bytes), bytes }
}

fn app() -> App {
    let mut app = App::of_component("hello".parse().unwrap(), "web".parse().unwrap(), Digest::of(CODE));
    app.components.values_mut().next().unwrap().files.insert("a.txt".into(), Digest::of(b"text"));
    app
}

pub(crate) fn release() -> Fetched {
    let files = [Bytes::from_static(CODE), Bytes::from_static(b"text")];
    Fetched::of_files(&app(), files.map(|bytes| (Digest::of(&bytes), bytes)).into())
}

fn signed_by(signer: &Signer) -> Fetched {
    let mut fetched = release();
    fetched.head.candidates.push(signer.signature(fetched.head.expected));
    fetched
}

fn policy(signer: &Signer) -> Terms {
    Policy::keys(vec![signer.key()], false).into()
}

/// Replaces the manifest by a changed one that is signed anew.
fn resigned(signer: &Signer, change: impl FnOnce(&mut Manifest)) -> Fetched {
    let mut fetched = release();
    let mut manifest: Manifest = serde_json::from_slice(&fetched.head.manifest).unwrap();
    change(&mut manifest);
    fetched.head.manifest = serde_json::to_vec(&manifest).unwrap().into();
    fetched.head.expected = Digest::of(&fetched.head.manifest);
    fetched.head.candidates = vec![signer.signature(fetched.head.expected)];
    fetched
}

/// What a node answers to a release whose only signature is `candidate`.
fn rejection(signer: &Signer, make: impl FnOnce(Digest) -> Candidate) -> SignatureError {
    let mut fetched = release();
    fetched.head.candidates.push(make(fetched.head.expected));
    match verify(fetched, &policy(signer)).unwrap_err() {
        VerifyError::Untrusted { found: 1, mut why } => why.kept.remove(0).1,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_trusted_key_signed_is_taken() {
    let signer = Signer::new();
    let verified = verify(signed_by(&signer), &policy(&signer)).unwrap();
    assert_eq!(verified.app(), &app());
    assert_eq!(verified.component(&"web".parse().unwrap()).unwrap().bytes(), CODE);
    assert_eq!(verified.file(&Digest::of(b"text")).unwrap(), "text");
    assert!(verified.component(&"other".parse().unwrap()).is_none());
}

#[test]
fn one_good_signature_among_bad_ones_is_enough() {
    let (signer, stranger) = (Signer::new(), Signer::new());
    let mut fetched = signed_by(&stranger);
    fetched.head.candidates.push(signer.signature(fetched.head.expected));
    assert!(verify(fetched, &policy(&signer)).is_ok());
}

#[test]
fn a_second_trusted_key_counts_as_well() {
    let (signer, other) = (Signer::new(), Signer::new());
    let keys = vec![other.key(), signer.key()];
    assert!(verify(signed_by(&signer), &Policy::keys(keys, false).into()).is_ok());
}

#[test]
fn an_ed25519_key_counts() {
    let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    let pair = Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).unwrap();
    let mut spki = hex("302a300506032b6570032100");
    spki.extend_from_slice(pair.public_key().as_ref());
    let mut fetched = release();
    let payload = serde_json::to_vec(&Statement::signature_of(fetched.head.expected)).unwrap();
    let sig = pair.sign(&pre_authentication_encoding(PAYLOAD_TYPE, &payload)).as_ref().to_vec();
    let signatures = vec![EnvelopeSignature { sig, keyid: String::new() }];
    let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.into(), signatures };
    fetched.head.candidates.push(candidate(&Bundle::of_key(&spki, envelope)));
    let keys = vec![PublicKey::from_pem(pem(&spki).as_bytes()).unwrap()];
    assert!(verify(fetched, &Policy::keys(keys, false).into()).is_ok());
}

#[test]
fn the_files_of_the_operator_need_no_signature() {
    assert!(verify(release(), &Policy::LocalFiles.into()).is_ok());
}

#[test]
fn an_unsigned_release_is_refused() {
    let error = verify(release(), &policy(&Signer::new())).unwrap_err();
    assert!(matches!(error, VerifyError::Unsigned), "{error:?}");
    assert_eq!(error.cause(), "unsigned");
}

#[test]
fn without_a_trusted_key_nothing_is_taken() {
    let none: Terms = Policy::keys(Vec::new(), true).into();
    assert_eq!(verify(signed_by(&Signer::new()), &none).unwrap_err().cause(), "untrusted");
    assert_eq!(verify(release(), &none).unwrap_err().cause(), "unsigned");
}

#[test]
fn a_signature_by_another_key_is_refused() {
    let (signer, stranger) = (Signer::new(), Signer::new());
    assert!(matches!(rejection(&signer, |digest| stranger.signature(digest)), SignatureError::Key));
}

#[test]
fn the_hint_lends_no_trust() {
    let (signer, stranger) = (Signer::new(), Signer::new());
    let forged = |digest| {
        let mut bundle = stranger.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
        bundle.verification_material =
            signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE).verification_material;
        candidate(&bundle)
    };
    assert!(matches!(rejection(&signer, forged), SignatureError::Key));
}

#[test]
fn a_changed_manifest_is_refused() {
    let signer = Signer::new();
    let mut fetched = signed_by(&signer);
    let mut bytes = fetched.head.manifest.to_vec();
    bytes.push(b' ');
    fetched.head.manifest = bytes.into();
    let error = verify(fetched, &policy(&signer)).unwrap_err();
    assert!(matches!(error, VerifyError::Digest { .. }) && error.cause() == "digest", "{error:?}");
}

#[test]
fn a_changed_blob_is_refused_whichever_it_is() {
    let signer = Signer::new();
    for digest in release().blobs.into_keys() {
        let mut fetched = signed_by(&signer);
        let blob = fetched.blobs.get_mut(&digest).unwrap();
        let mut bytes = blob.to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        *blob = bytes.into();
        let error = verify(fetched, &policy(&signer)).unwrap_err();
        assert!(matches!(error, VerifyError::Digest { expected, .. } if expected == digest), "{error:?}");
    }
}

#[test]
fn a_blob_that_did_not_come_is_named() {
    let signer = Signer::new();
    let mut fetched = signed_by(&signer);
    fetched.blobs.remove(&Digest::of(b"text"));
    let error = verify(fetched, &policy(&signer)).unwrap_err();
    assert!(matches!(error, VerifyError::Missing(digest) if digest == Digest::of(b"text")), "{error:?}");
}

#[test]
fn an_attestation_is_no_signature() {
    let signer = Signer::new();
    let attestation = |digest| {
        let mut statement = Statement::signature_of(digest);
        statement.predicate_type = "https://cosign.sigstore.dev/attestation/vuln/v1".into();
        candidate(&signer.bundle(&statement, PAYLOAD_TYPE))
    };
    assert!(matches!(rejection(&signer, attestation), SignatureError::Attestation(kind) if kind.contains("vuln")));
}

#[test]
fn a_signature_over_another_artifact_is_refused() {
    let signer = Signer::new();
    let other = |_| signer.signature(Digest::of(b"another manifest"));
    assert!(matches!(rejection(&signer, other), SignatureError::Subject));
}

#[test]
fn a_bundle_of_another_version_is_refused() {
    let signer = Signer::new();
    let old = "application/vnd.dev.sigstore.bundle+json;version=0.1";
    let outside = |digest| {
        let mut candidate = signer.signature(digest);
        candidate.layer.media_type = old.into();
        candidate
    };
    assert!(matches!(rejection(&signer, outside), SignatureError::MediaType));
    let inside = |digest| {
        let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
        bundle.media_type = old.into();
        candidate(&bundle)
    };
    assert!(matches!(rejection(&signer, inside), SignatureError::MediaType));
}

#[test]
fn a_certificate_is_refused_where_keys_are_trusted() {
    let signer = Signer::new();
    for keep_key in [true, false] {
        let certified = |digest| {
            let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
            bundle.verification_material.certificate = Some(serde_json::json!({"rawBytes": "MIIB"}));
            bundle.verification_material.public_key.take_if(|_| !keep_key);
            candidate(&bundle)
        };
        let why = rejection(&signer, certified);
        // Both at once is neither.
        assert!(matches!(why, SignatureError::NoKey) == keep_key, "{why}");
        assert!(matches!(why, SignatureError::OnlyKeys) != keep_key, "{why}");
    }
    let nobody = |digest| {
        let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
        bundle.verification_material.public_key = None;
        candidate(&bundle)
    };
    assert!(matches!(rejection(&signer, nobody), SignatureError::NoKey));
}

#[test]
fn an_envelope_has_exactly_one_signature() {
    let signer = Signer::new();
    for count in [0, 2] {
        let several = |digest| {
            let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
            let signatures = &mut bundle.dsse_envelope.as_mut().unwrap().signatures;
            *signatures = vec![signatures[0].clone(); count];
            candidate(&bundle)
        };
        assert!(matches!(rejection(&signer, several), SignatureError::Signatures(found) if found == count));
    }
}

#[test]
fn a_payload_of_another_type_is_refused() {
    let signer = Signer::new();
    let other_type = |digest| candidate(&signer.bundle(&Statement::signature_of(digest), "application/json"));
    assert!(matches!(rejection(&signer, other_type), SignatureError::Payload));
    let other_statement = |digest| {
        let mut statement = Statement::signature_of(digest);
        statement.kind = "https://in-toto.io/Statement/v0.1".into();
        candidate(&signer.bundle(&statement, PAYLOAD_TYPE))
    };
    assert!(matches!(rejection(&signer, other_statement), SignatureError::Payload));
    let no_envelope = |digest| {
        let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
        bundle.dsse_envelope = None;
        candidate(&bundle)
    };
    assert!(matches!(rejection(&signer, no_envelope), SignatureError::NoEnvelope));
}

#[test]
fn a_signature_without_the_encoding_of_its_type_is_refused() {
    let signer = Signer::new();
    let raw = |digest| {
        let mut bundle = signer.bundle(&Statement::signature_of(digest), PAYLOAD_TYPE);
        let envelope = bundle.dsse_envelope.as_mut().unwrap();
        envelope.signatures[0].sig = signer.sign(&envelope.payload);
        candidate(&bundle)
    };
    assert!(matches!(rejection(&signer, raw), SignatureError::Key));
}

#[test]
fn a_huge_bundle_is_not_parsed() {
    let signer = Signer::new();
    let huge = |_| {
        let bytes = Bytes::from(vec![b' '; selvage_config::signature::BUNDLE_BYTES_MAX + 1]);
        Candidate { layer: Descriptor::of(oci::BUNDLE, &bytes), bytes }
    };
    assert!(matches!(rejection(&signer, huge), SignatureError::Large));
}

#[test]
fn no_number_of_other_signatures_hides_a_good_one() {
    let (signer, stranger) = (Signer::new(), Signer::new());
    let mut fetched = release();
    let digest = fetched.head.expected;
    fetched.head.candidates = (0..500).map(|_| stranger.signature(digest)).collect();
    let error = verify(fetched.clone(), &policy(&signer)).unwrap_err();
    assert!(matches!(error, VerifyError::Untrusted { found: 500, .. }), "{error:?}");
    assert!(error.source().unwrap().to_string().len() < 8_000);
    fetched.head.candidates.push(signer.signature(digest));
    assert!(verify(fetched, &policy(&signer)).is_ok());
}

#[test]
fn the_old_form_counts_only_where_it_is_allowed_and_nothing_newer_is_there() {
    let signer = Signer::new();
    // New terms each time: a verdict is remembered.
    let allowing = || Terms::from(Policy::keys(vec![signer.key()], true));
    let of = |kind| {
        let mut fetched = release();
        fetched.head.candidates.push(signer.legacy(fetched.head.expected, kind));
        fetched
    };
    assert!(verify(of(SIMPLE_SIGNING_TYPE), &allowing()).is_ok());
    assert_eq!(verify(of(SIMPLE_SIGNING_TYPE), &policy(&signer)).unwrap_err().cause(), "untrusted");
    assert_eq!(verify(of("something else"), &allowing()).unwrap_err().cause(), "untrusted");

    let mut beside = of(SIMPLE_SIGNING_TYPE);
    beside.head.candidates.push(Signer::new().signature(beside.head.expected));
    assert_eq!(verify(beside, &allowing()).unwrap_err().cause(), "untrusted");

    let mut other = release();
    other.head.candidates.push(signer.legacy(Digest::of(b"other"), SIMPLE_SIGNING_TYPE));
    assert_eq!(verify(other, &allowing()).unwrap_err().cause(), "untrusted");

    let mut unsigned = of(SIMPLE_SIGNING_TYPE);
    unsigned.head.candidates[0].layer.annotations.clear();
    assert_eq!(verify(unsigned, &allowing()).unwrap_err().cause(), "untrusted");
}

#[test]
fn a_release_of_one_app_is_not_taken_for_another() {
    let signer = Signer::new();
    let mut fetched = signed_by(&signer);
    fetched.app = "bank".parse().unwrap();
    let error = verify(fetched, &policy(&signer)).unwrap_err();
    assert!(matches!(error, VerifyError::Name { .. }), "{error:?}");
}

#[test]
fn one_component_without_a_document_is_granted_nothing() {
    let signer = Signer::new();
    let lone = |config: Descriptor, layers: usize| {
        resigned(&signer, |manifest| {
            manifest.config = config;
            manifest.layers = vec![Descriptor::of(oci::WASM, CODE); layers];
        })
    };
    for config in [Descriptor::of(oci::WASM_CONFIG, b"{\"os\":\"wasip2\"}"), Descriptor::of(oci::EMPTY, b"{}")] {
        let verified = verify(lone(config, 1), &policy(&signer)).unwrap();
        let name = "hello".parse().unwrap();
        assert_eq!(verified.app().components[&name], Component::granted_nothing(Digest::of(CODE)));
    }
    for layers in [0, 2] {
        let error = verify(lone(Descriptor::of(oci::EMPTY, b"{}"), layers), &policy(&signer)).unwrap_err();
        assert!(matches!(error, VerifyError::Form(_)), "{error:?}");
    }
}

#[test]
fn a_signed_manifest_of_another_kind_is_refused() {
    let signer = Signer::new();
    let changes: [fn(&mut Manifest); 5] = [
        |m| m.schema_version = 1,
        |m| m.media_type = Some(oci::INDEX.into()),
        |m| m.config.media_type = "application/vnd.oci.image.config.v1+json".into(),
        |m| m.layers.push(Descriptor::of("application/vnd.oci.image.layer.v1.tar", b"")),
        |m| m.layers[0].size = u64::MAX,
    ];
    for change in changes {
        let error = verify(resigned(&signer, change), &policy(&signer)).unwrap_err();
        assert!(matches!(error, VerifyError::Form(_)), "{error:?}");
    }
    let mut index = release();
    let document = Index { schema_version: 2, media_type: Some(oci::INDEX.into()), manifests: Vec::new() };
    index.head.manifest = serde_json::to_vec(&document).unwrap().into();
    index.head.expected = Digest::of(&index.head.manifest);
    assert!(matches!(verify(index, &Policy::LocalFiles.into()), Err(VerifyError::Manifest(_))));
}

#[test]
fn what_the_app_names_must_be_a_layer_of_its_kind() {
    let signer = Signer::new();
    let changes: [fn(&mut Manifest); 3] = [
        |m| m.layers.clear(),
        |m| m.layers.iter_mut().for_each(|layer| layer.media_type = oci::APP_FILE.into()),
        |m| m.layers.iter_mut().for_each(|layer| layer.media_type = oci::WASM.into()),
    ];
    for change in changes {
        let error = verify(resigned(&signer, change), &policy(&signer)).unwrap_err();
        assert!(matches!(error, VerifyError::Layer { .. }), "{error:?}");
    }
    let longer = resigned(&signer, |m| m.layers[0].size += 1);
    assert!(matches!(verify(longer, &policy(&signer)), Err(VerifyError::Size { .. })));
}

#[test]
fn code_that_is_no_wasm_is_refused() {
    let app = App::of_component("hello".parse().unwrap(), "web".parse().unwrap(), Digest::of(b"#!/bin/sh"));
    let files = [(Digest::of(b"#!/bin/sh"), Bytes::from_static(b"#!/bin/sh"))].into();
    let error = verify(Fetched::of_files(&app, files), &Policy::LocalFiles.into()).unwrap_err();
    assert!(matches!(error, VerifyError::NotWasm(_)), "{error:?}");
}

#[test]
fn other_keys_are_refused() {
    let signer = Signer::new();
    let (one, mut p384) = (pem(&signer.spki()), signer.spki());
    p384[21] ^= 1;
    assert!(matches!(PublicKey::from_pem(b"no pem"), Err(KeyError::Pem(_))));
    assert!(matches!(PublicKey::from_pem(format!("{one}{one}").as_bytes()), Err(KeyError::Several)));
    assert!(matches!(PublicKey::from_pem(pem(&p384).as_bytes()), Err(KeyError::Kind)));
    assert!(matches!(PublicKey::from_pem(pem(&signer.spki()[..90]).as_bytes()), Err(KeyError::Kind)));
}

proptest! {
    #[test]
    fn no_garbage_is_taken_and_none_panics(bytes: Vec<u8>, legacy: bool, annotation: String) {
        let mut fetched = release();
        let bytes = Bytes::from(bytes);
        let media_type = if legacy { oci::SIMPLE_SIGNING } else { oci::BUNDLE };
        let mut layer = Descriptor::of(media_type, &bytes);
        layer.annotations.insert(oci::COSIGN_SIGNATURE.into(), annotation);
        fetched.head.candidates.push(Candidate { layer, bytes });
        let keys = vec![Signer::new().key()];
        let policy: Terms = Policy::keys(keys, true).into();
        prop_assert!(verify(fetched, &policy).is_err());
    }

    #[test]
    fn no_garbage_of_a_manifest_panics(bytes: Vec<u8>) {
        let mut fetched = release();
        fetched.head.expected = Digest::of(&bytes);
        fetched.head.manifest = bytes.into();
        prop_assert!(verify(fetched, &Policy::LocalFiles.into()).is_err());
    }

    #[test]
    fn no_flipped_bit_of_a_statement_is_taken(position: prop::sample::Index, bit in 0..8_u32) {
        let signer = Signer::new();
        let statement = Statement::signature_of(release().head.expected);
        let mut bundle = signer.bundle(&statement, PAYLOAD_TYPE);
        let envelope = bundle.dsse_envelope.as_mut().unwrap();
        let byte = position.get_mut(&mut envelope.payload);
        *byte ^= 1 << bit;
        let mut fetched = release();
        fetched.head.candidates.push(candidate(&bundle));
        prop_assert!(verify(fetched, &policy(&signer)).is_err());
    }
}
