//! What bodies look like, as JSON Schema (draft 2020-12, as OpenAPI 3.1 has it), each with an example that is taken.

use selvage_config::Digest;
use serde_json::{Map, Value, json};

/// Every body that a [`Route`](super::Route) names.
pub(super) fn all() -> Map<String, Value> {
    let named = [
        ("ReleaseRequest", release()),
        ("Share", share()),
        (
            "RollbackRequest",
            object(&json!({ "to": { "type": ["integer", "null"], "minimum": 1 } }), &[], &json!({ "to": 1 })),
        ),
        ("SecretRequest", object(&json!({ "value": text() }), &["value"], &json!({ "value": "s3cret" }))),
        ("NodeRequest", node()),
        ("Status", status()),
        ("StatusDelta", status_delta()),
        ("Revoked", revoked()),
        ("JoinTokenRequest", join_token()),
        ("JoinRequest", join()),
        ("CertificateRequest", object(&json!({ "request": request() }), &["request"], &json!({ "request": "MIIB" }))),
        ("RenewalRequest", renewal()),
    ];
    named.into_iter().map(|(name, schema)| (name.to_owned(), schema)).collect()
}

/// An object that has these properties and no other.
fn object(properties: &Value, required: &[&str], example: &Value) -> Value {
    json!({
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
        "examples": [example],
    })
}

fn text() -> Value {
    json!({ "type": "string" })
}

fn texts() -> Value {
    json!({ "type": "object", "additionalProperties": text() })
}

fn list(of: &Value) -> Value {
    json!({ "type": "array", "items": of })
}

fn digest() -> Value {
    json!({ "type": "string", "pattern": "^sha256:[0-9a-f]{64}$" })
}

fn request() -> Value {
    json!({ "type": "string", "contentEncoding": "base64", "description": "PKCS #10 in DER; only its key counts." })
}

fn release() -> Value {
    let wave = json!({ "type": "object", "description": "Which nodes, and for how long they are watched." });
    let waves = json!({
        "type": "object",
        "properties": { "waves": list(&wave), "gate": { "type": "object", "description": "What halts it." } },
        "required": ["waves"],
        "additionalProperties": false,
    });
    let one = |name: &str, schema: &Value| {
        let mut properties = Map::new();
        properties.insert(name.to_owned(), schema.clone());
        json!({ "type": "object", "properties": properties, "required": [name], "additionalProperties": false })
    };
    let split = json!({ "$ref": "#/components/schemas/Share" });
    let rollout = json!({ "oneOf": [{ "const": "at_once" }, one("waves", &waves), one("split", &split)] });
    let properties = json!({
        "repository": text(),
        "reference": { "type": "string", "description": "A digest, or a tag, which is resolved once." },
        "variables": texts(),
        "rollout": rollout,
    });
    let example = json!({
        "repository": "apps/hello", "reference": "v1", "variables": { "greeting": "hello" },
        "rollout": { "split": { "percent": 5, "key": "cookie:sid" } },
    });
    object(&properties, &["repository", "reference"], &example)
}

fn share() -> Value {
    let properties = json!({
        "percent": { "type": "integer", "minimum": 0, "maximum": 100 },
        "key": { "type": "string", "description": "client, header:NAME or cookie:NAME" },
        "named": { "type": "boolean" },
    });
    object(&properties, &["percent"], &json!({ "percent": 20, "key": "client", "named": false }))
}

fn node() -> Value {
    let labels = json!({
        "type": "object", "properties": { "labels": texts() }, "required": ["labels"], "additionalProperties": false,
    });
    let words = json!({ "enum": ["cordon", "uncordon", "drain", "undrain", "revoke"] });
    json!({ "oneOf": [words, labels], "examples": ["cordon"] })
}

fn status() -> Value {
    let address = json!({ "type": ["string", "null"], "description": "address:port" });
    let some = |what: &str| json!({ "type": "object", "description": what });
    let properties = json!({
        "node": text(), "region": text(), "version": text(),
        "generation": { "type": "integer", "minimum": 0 },
        "replication": address, "front": address, "admin": address,
        "apps": list(&some("What became of one app.")),
        "plan": { "type": ["object", "null"], "description": "How fresh the node's plans are." },
        "load": list(&some("How one release does.")),
        "labels": texts(),
    });
    let required = ["node", "region", "version", "generation", "apps"];
    let example = json!({
        "node": "fra-1", "region": "fra", "version": "1.0.0", "generation": 0,
        "replication": "192.0.2.7:7401", "front": null, "admin": null, "apps": [],
    });
    object(&properties, &required, &example)
}

fn status_delta() -> Value {
    let some = |what: &str| json!({ "type": "object", "description": what });
    let properties = json!({
        "base": digest(), "digest": digest(),
        "about": { "type": ["object", "null"], "description": "All but apps and load, where something of it changed." },
        "apps": list(&some("What became of one app.")),
        "gone": list(&text()),
        "load": list(&some("How one release does.")),
    });
    let example = json!({ "base": Digest::of(b"before"), "digest": Digest::of(b"after"), "gone": ["hello"] });
    object(&properties, &["base", "digest"], &example)
}

fn revoked() -> Value {
    let key = json!({ "type": "string", "description": "The id of a public key." });
    let properties = json!({ "digests": list(&digest()), "keys": list(&key), "identities": list(&text()) });
    object(&properties, &[], &json!({ "digests": [Digest::of(b"example")], "identities": ["ci@example.org"] }))
}

fn join_token() -> Value {
    let properties = json!({
        "region": text(),
        "node": { "type": ["string", "null"], "description": "The only name that it may be used for." },
        "labels": texts(),
        "ttl_seconds": { "type": ["integer", "null"], "minimum": 1, "maximum": 604_800 },
    });
    object(&properties, &["region"], &json!({ "region": "fra", "labels": { "tier": "canary" }, "ttl_seconds": 600 }))
}

fn join() -> Value {
    let properties = json!({ "token": text(), "node": text(), "request": request() });
    let token = format!("sj1.0a.beef.{}", Digest::of(b"example").hex());
    object(&properties, &["token", "node", "request"], &json!({ "token": token, "node": "fra-9", "request": "MIIB" }))
}

fn renewal() -> Value {
    let certificate = json!({ "type": "string", "description": "The certificate that has ended, PEM." });
    let properties = json!({ "certificate": certificate, "request": request() });
    let example = json!({ "certificate": "-----BEGIN CERTIFICATE-----", "request": "MIIB" });
    object(&properties, &["certificate", "request"], &example)
}
