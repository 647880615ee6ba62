//! Bad input: one clear error, the documented exit code, nothing left half-made.

use std::fs;
use std::path::Path;

use crate::program::{example, finish, selvage};

const MANIFEST: &str = "spin_manifest_version = 2\n\n[application]\nname = \"app\"\n\n[[trigger.http]]\nroute = \"/...\"\ncomponent = \"app\"\n\n[component.app]\nsource = \"app.wasm\"\n";

/// What the program says of an app, in text and as JSON.
fn told(directory: &Path, arguments: &[&str]) -> (i32, String, serde_json::Value) {
    let run = |json: bool| {
        let mut command = selvage();
        command.args(arguments).current_dir(directory);
        finish(if json { command.args(["-o", "json"]) } else { &mut command })
    };
    let (text, json) = (run(false), run(true));
    assert_eq!(text.status.code(), json.status.code());
    let document = String::from_utf8_lossy(&json.stderr).into_owned();
    let document = serde_json::from_str(document.trim()).unwrap_or_else(|e| panic!("{e}: {document}"));
    (text.status.code().unwrap(), String::from_utf8_lossy(&text.stderr).into_owned(), document)
}

fn app(manifest: &str, wasm: &[u8]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("spin.toml"), manifest).unwrap();
    fs::write(directory.path().join("app.wasm"), wasm).unwrap();
    directory
}

fn guest(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../node/tests/guests/{name}.wat"));
    wat::parse_file(path).unwrap()
}

#[test]
fn a_mistake_in_a_manifest_is_told_with_file_line_field_and_hint() {
    for (from, to, line, field) in [
        ("[[trigger.http]]", "[[trigger.http]", 6, ""),
        ("route =", "rout =", 7, "rout"),
        ("component = \"app\"", "component = \"other\"", 8, "trigger.http.component"),
        ("app.wasm", "gone.wasm", 11, "component.app.source"),
    ] {
        let directory = app(&MANIFEST.replacen(from, to, 1), &guest("hello"));
        let (code, text, json) = told(directory.path(), &["up"]);
        assert_eq!(code, 2, "{text}");
        let place = &json["places"][0];
        assert_eq!((place["line"].as_u64(), place["field"].as_str()), (Some(line), Some(field)), "{json}");
        assert!(text.contains("spin.toml") && text.contains(&format!(":{line}:")), "{text}");
    }
}

#[test]
fn a_missing_manifest_is_told_with_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let (code, text, json) = told(directory.path(), &["up"]);
    assert_eq!(code, 2);
    assert!(text.contains("spin.toml") && json["hint"].as_str().unwrap().contains("-f"), "{text}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn what_is_no_component_is_refused() {
    let directory = app(MANIFEST, b"#!/bin/sh\n");
    let (code, text, _) = told(directory.path(), &["up"]);
    assert!(code == 2 && text.contains("not WebAssembly"), "{text}");
    let directory = app(MANIFEST, b"\0asm\x0d\0\x01\0garbage");
    let (code, text, _) = told(directory.path(), &["up", "--listen", "127.0.0.1:0"]);
    assert_eq!(code, 1, "{text}");
    let directory = app(MANIFEST, &guest("not_http"));
    let (code, text, _) = told(directory.path(), &["up", "--listen", "127.0.0.1:0"]);
    assert!(code == 1 && text.contains("wasi:http"), "{text}");
}

#[test]
fn imports_that_nobody_grants_are_named() {
    let directory = app(MANIFEST, &guest("ungranted"));
    for command in [&["up", "--listen", "127.0.0.1:0"][..], &["check"]] {
        let (code, text, _) = told(directory.path(), command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("acme:unknown/thing"), "{text}");
    }
}

#[test]
fn a_port_in_use_is_told_with_a_hint() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let hello = example("hello").display().to_string();
    let (code, text, json) = told(Path::new("."), &["up", "-f", &hello, "--listen", &address]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains(&address) && json["hint"].as_str().unwrap().contains("--find-free-port"), "{text}");
}

#[test]
fn all_mistakes_of_a_node_file_are_told_before_a_socket_opens() {
    let directory = tempfile::tempdir().unwrap();
    let text = "name = 'a'\nregion = 'b'\nstate_dir = 's'\nlisten = { https = '127.0.0.1:0' }\ncontrol_plane = { address = 'x:1' }\n";
    fs::write(directory.path().join("node.toml"), text).unwrap();
    let (code, _, json) = told(directory.path(), &["node"]);
    assert_eq!((code, json["places"].as_array().unwrap().len()), (2, 4), "{json}");
    let (code, _, _) = told(directory.path(), &["check", "node.toml"]);
    assert_eq!(code, 2);
    assert!(!directory.path().join("s").exists(), "no state is made");
}

#[test]
fn a_fleet_that_is_not_there_is_told_with_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let (code, text, json) = told(directory.path(), &["nodes"]);
    assert!(code == 2 && text.contains("selvage-context.toml"), "{text}");
    assert!(json["hint"].as_str().unwrap().contains("--context"));
}

#[test]
fn a_key_is_never_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let make = || finish(selvage().arg("key").current_dir(directory.path()));
    assert!(make().status.success());
    let first = fs::read(directory.path().join("cosign.key")).unwrap();
    assert_eq!(make().status.code(), Some(2));
    assert_eq!(fs::read(directory.path().join("cosign.key")).unwrap(), first);
}
