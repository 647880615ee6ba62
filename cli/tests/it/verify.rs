//! `selvage verify` and `selvage revoke` against a fleet that was set up by hand.

use std::time::{Duration, Instant};

use selvage_certs::Authority;
use serde_json::Value;

use crate::by_hand::Fleet;
use crate::program::{example, finish, selvage, well};

fn told(output: &std::process::Output) -> (i32, Value) {
    let text = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
    (output.status.code().unwrap(), serde_json::from_slice(text).unwrap())
}

#[test]
fn verify_says_what_a_node_would_also_offline_and_revoke_takes_it_back() {
    let fleet = Fleet::start();
    let source = example("hello").display().to_string();
    let (_, pushed) = told(&fleet.selvage(&["push", "-f", &source, "--repository", "acme/hello", "-o", "json"]));
    let digest = pushed["manifest"].as_str().unwrap().to_owned();
    let reference = format!("acme/hello@{digest}");
    let policy = "[[rule]]\napps = ['hello']\nrepositories = ['acme/*']\nsigners = [{ name = 'release', key = 'release.pub' }]\n";
    std::fs::write(fleet.path("policy.toml"), policy).unwrap();
    let verify = |more: &[&str]| {
        let fixed = ["verify", &reference, "--policy", "policy.toml", "-o", "json"];
        told(&fleet.selvage(&[&fixed, more].concat()))
    };
    let (code, answer) = verify(&[]);
    assert_eq!((code, answer["cause"].as_str()), (1, Some("unsigned")), "{answer}");
    well("sign", &fleet.selvage(&["sign", &reference, "--key", "release.key"]));
    let (code, answer) = verify(&[]);
    assert_eq!((code, &answer["accepted"], &answer["proofs"][0]["signers"][0]), (0, &true.into(), &"release".into()));
    let (code, answer) = verify(&["--app", "bank"]);
    assert_eq!((code, answer["cause"].as_str()), (1, Some("policy")), "{answer}");

    // The bundle as a file, with no fleet to ask.
    let blobs = std::fs::read_dir(fleet.path("control-plane/blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let is_bundle =
        |path: &std::path::PathBuf| String::from_utf8_lossy(&std::fs::read(path).unwrap()).contains("dsseEnvelope");
    let bundle = blobs.into_iter().find(is_bundle).unwrap().display().to_string();
    let key = fleet.path("release.pub").display().to_string();
    let offline = |digest: &str, key: &str| {
        let fixed = ["verify", "--bundle", &bundle, "--digest", digest, "--key", key, "--app", "hello", "-o", "json"];
        told(&finish(selvage().args(fixed).current_dir(std::env::temp_dir())))
    };
    assert_eq!(offline(&digest, &key).0, 0);
    let (code, answer) = offline(&format!("sha256:{}", "0".repeat(64)), &key);
    assert_eq!((code, answer["rejected"][0]["cause"].as_str()), (1, Some("subject_mismatch")), "{answer}");
    let other = fleet.path("plan.pub").display().to_string();
    assert_eq!(offline(&digest, &other).1["rejected"][0]["cause"], "key");

    well("deploy", &fleet.selvage(&["deploy", &reference, "--app", "hello"]));
    well("revoke", &fleet.selvage(&["revoke", "--digest", &digest]));
    assert!(well("list", &fleet.selvage(&["revoke", "--list"])).contains(&digest));
    let began = Instant::now();
    loop {
        let nodes = well("nodes", &fleet.selvage(&["nodes"]));
        if nodes.contains("hello:- (refused hello@1: revoked)") {
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{nodes}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn check_refuses_a_pattern_that_matches_a_part_of_a_name_and_tells_what_is_not_meant() {
    let directory = tempfile::tempdir().unwrap();
    let check = |policy: &str| {
        std::fs::write(directory.path().join("policy.toml"), policy).unwrap();
        told(&finish(selvage().args(["check", "policy.toml", "-o", "json"]).current_dir(directory.path())))
    };
    well("key", &finish(selvage().arg("key").current_dir(directory.path())));
    let rule = "[[rule]]\nsigners = [{ key = 'cosign.pub' }]\n";
    assert_eq!(check(rule).0, 0);
    let (code, answer) = check(&format!("{rule}[[rule]]\nsigners = [{{ key = 'cosign.pub' }}]\n"));
    assert_eq!((code, answer["lints"][0]["field"].as_str()), (1, Some("rule[1]")), "{answer}");
    // A node's configuration is no better than its policy.
    let node = "name='a'\nregion='fra'\nstate_dir='s'\nlisten={https='127.0.0.1:0'}\n\
                certificates=[{certificate='front.pem',key='front.key'}]\ntrust={policy='policy.toml'}\n";
    std::fs::write(directory.path().join("node.toml"), node).unwrap();
    let front = Authority::create("front").unwrap().issue_server(&["a.test".to_owned()], &[]).unwrap();
    front.save(directory.path().join("front.pem"), directory.path().join("front.key")).unwrap();
    let check_node = ["check", "node.toml", "-o", "json"];
    let (code, answer) = told(&finish(selvage().args(check_node).current_dir(directory.path())));
    assert_eq!((code, answer["lints"][0]["field"].as_str()), (1, Some("rule[1]")), "{answer}");
    let loose = "[[rule]]\nsigners = [{ identity_pattern = 'github.com/acme', issuer = 'x', trusted_root = 'r' }]\n";
    let (code, answer) = check(loose);
    assert_eq!((code, answer["places"][0]["line"].as_u64()), (2, Some(2)), "{answer}");
    assert!(answer["places"][0]["message"].as_str().unwrap().contains("not anchored"), "{answer}");
}
