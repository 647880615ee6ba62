use std::path::Path;

use super::Manifest;
use crate::app::isolation::{Isolation, Reuse};
use crate::app::route::Pattern;
use crate::invalid::{Invalid, Place};

const GOOD: &str = r#"spin_manifest_version = 2

[application]
name = "gate"
version = "0.1.0"
authors = ["a"]

[application.tool.selvage]
hosts = ["gate.example"]

[[application.tool.selvage.jwt]]
name = "demo"
issuer = "https://issuer.example"
audiences = ["gate"]
jwks_file = "jwks.json"

[application.tool.other]
anything = { goes = true }

[variables]
greeting = { default = "hi" }
token = { required = true, secret = true }

[[trigger.http]]
route = "/api/:id/..."
component = "gate"

[[trigger.http]]
route = "/old"
static_response = { status_code = 302, headers = { location = "/" } }

[[trigger.http]]
route = { private = true }
component = "gate"

[component.gate]
source = "gate.wasm"
allowed_outbound_hosts = ["https://api.example", "https://{{ greeting }}.example"]
key_value_stores = ["default"]
files = ["a/*", { source = "b", destination = "/c" }]

[component.gate.variables]
word = "{{ greeting }}!"

[component.gate.build]
command = "cargo build"

[component.gate.tool.selvage]
jwt = "demo"
jwt_exempt = ["/public/..."]
limits = { cpu_ms = 20 }
"#;

fn parse(text: &str) -> Result<Manifest, Invalid> {
    Manifest::parse(Path::new("spin.toml"), text)
}

fn only_place(text: &str) -> Place {
    let mut places = parse(text).unwrap_err().places();
    assert_eq!(places.len(), 1, "{places:?}");
    places.remove(0)
}

#[test]
fn a_manifest_with_rules_of_ours_is_read() {
    let manifest = parse(GOOD).unwrap();
    assert_eq!(manifest.routes.len(), 2, "a private route is not routable");
    assert_eq!(manifest.routes[0].pattern, "/api/:id/...".parse::<Pattern>().unwrap());
    let gate = manifest.components.values().next().unwrap();
    assert_eq!(gate.jwt.as_ref().unwrap().issuer, "demo");
    assert_eq!((gate.limits.cpu_ms, gate.limits.wall_ms), (20, 30_000));
    assert_eq!(manifest.issuers["demo"].audiences, ["gate"]);
}

#[test]
fn each_mistake_is_told_with_its_line_and_field() {
    for (from, to, line, field) in [
        ("name = \"gate\"", "name = \"Gate\"", 4, "application.name"),
        ("version = 2", "version = 1", 1, "spin_manifest_version"),
        (
            "component = \"gate\"\n\n[[trigger.http]]\nroute = \"/old\"",
            "component = \"gaet\"\n\n[[trigger.http]]\nroute = \"/old\"",
            26,
            "trigger.http.component",
        ),
        ("\"/api/:id/...\"", "\"api\"", 25, "trigger.http.route"),
        ("\"/old\"", "\"/api/:id/...\"", 29, "trigger.http.route"),
        ("status_code = 302", "status_code = 99", 30, "trigger.http.static_response.status_code"),
        ("https://api.example", "api.example", 38, "component.gate.allowed_outbound_hosts"),
        ("[\"default\"]", "[\"De fault\"]", 39, "component.gate.key_value_stores"),
        ("{{ greeting }}!", "{{ nobody }}!", 43, "component.gate.variables.word"),
        ("jwt = \"demo\"", "jwt = \"nobody\"", 49, "component.gate.tool.selvage.jwt"),
        ("audiences = [\"gate\"]", "audiences = []", 14, "application.tool.selvage.jwt.demo.audiences"),
        (
            "jwks_file = \"jwks.json\"",
            "jwks_url = \"http://evil.example/\"",
            15,
            "application.tool.selvage.jwt.demo.jwks_url",
        ),
        ("default = \"hi\"", "required = false", 21, "variables.greeting"),
        ("cpu_ms = 20", "cpu_ms = 0", 51, "component.gate.tool.selvage.limits.cpu_ms"),
        ("limits = { cpu_ms = 20 }", "isolation = \"shared\"", 51, "component.gate.tool.selvage.isolation"),
        ("limits = { cpu_ms = 20 }", "reuse = { idle_ms = 5 }", 51, "component.gate.tool.selvage.reuse"),
        (
            "limits = { cpu_ms = 20 }",
            "isolation = \"reuse\"\nreuse = { requests_max = 0 }",
            52,
            "component.gate.tool.selvage.reuse.requests_max",
        ),
        ("gate.example\"]", "Gate.example\"]", 9, "application.tool.selvage.hosts"),
        ("source = \"gate.wasm\"", "source = { url = \"https://x\", digest = \"d\" }", 37, "component.gate.source"),
        ("key_value_stores", "sqlite_databases", 39, "component.gate.sqlite_databases"),
    ] {
        let place = only_place(&GOOD.replacen(from, to, 1));
        assert_eq!((place.line, place.field.as_str()), (Some(line), field), "{to}: {place:?}");
    }
}

#[test]
fn requests_share_nothing_unless_the_author_says_so() {
    let isolation = |text: &str| parse(text).unwrap().components.values().next().unwrap().isolation;
    let with = |rules: &str| GOOD.replacen("limits = { cpu_ms = 20 }", rules, 1);
    assert_eq!(isolation(GOOD), Isolation::Fresh);
    assert_eq!(isolation(&with("isolation = \"fresh\"")), Isolation::Fresh);
    assert_eq!(isolation(&with("isolation = \"reuse\"")), Isolation::Reuse(Reuse::default()));
    let bounded = with("isolation = \"reuse\"\nreuse = { idle_ms = 5 }");
    assert_eq!(isolation(&bounded), Isolation::Reuse(Reuse { idle_ms: 5, ..Reuse::default() }));
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let place = only_place(&GOOD.replace("key_value_stores", "key_value_store"));
    assert_eq!((place.line, place.field.as_str()), (Some(39), "key_value_store"));
    let place = only_place(&GOOD.replace("jwt_exempt", "jwt_excempt"));
    assert_eq!(place.field, "jwt_excempt");
    let place = only_place(&GOOD.replace("[[trigger.http]]\nroute = \"/old\"", "[[trigger.redis]]\nroute = \"/old\""));
    assert_eq!(place.field, "redis");
}

#[test]
fn all_mistakes_are_told_in_the_order_of_the_text() {
    let text = GOOD.replace("\"/old\"", "\"old\"").replace("[\"default\"]", "[\"-\"]").replace("\"Gate\"", "\"G\"");
    let lines: Vec<_> = parse(&text).unwrap_err().places().into_iter().map(|p| p.line).collect();
    assert_eq!(lines, [Some(29), Some(39)]);
}

#[test]
fn an_app_without_a_route_is_refused() {
    let place = only_place("spin_manifest_version = 2\n[application]\nname = \"a\"\n");
    assert_eq!(place.field, "trigger.http");
}

proptest::proptest! {
    #[test]
    fn no_text_panics(text in ".*") {
        let _ = parse(&text);
    }

    #[test]
    fn no_cut_of_a_good_manifest_panics(at in 0..GOOD.len()) {
        let _ = parse(&GOOD[..at]);
        let _ = parse(&GOOD[at..]);
    }
}

#[test]
fn requests_carry_spins_fields_unless_the_author_says_otherwise() {
    let told = |text: &str| parse(text).unwrap().components.values().next().unwrap().spin_headers;
    let with = |rules: &str| GOOD.replacen("limits = { cpu_ms = 20 }", rules, 1);
    assert!(told(GOOD) && told(&with("spin_headers = true")));
    assert!(!told(&with("spin_headers = false")));
    let place = only_place(&with("spin_headers = \"no\""));
    assert_eq!(place.line, Some(51), "{place:?}");
    let forwarded = |rules: &str| parse(&with(rules)).unwrap().components.values().next().unwrap().forwarded_headers;
    assert_eq!(forwarded("spin_headers = false"), None);
    assert_eq!(forwarded("forwarded_headers = true"), Some(true));
    assert_eq!(only_place(&with("forwarded_headers = 1")).line, Some(51));
}
