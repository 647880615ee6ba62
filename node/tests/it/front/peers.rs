//! Clients that were not written here, against the front: curl, h2load (Debian: nghttp2-client), slowhttptest (Debian),
//! Chromium (Debian), sslyze (PyPI).
//!
//! `.ci/tools` installs them. Without one its part is skipped with a loud line; never in CI.

use std::path::PathBuf;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA256, digest};

use super::*;

/// A program by its name, or that it is missing.
fn program(name: &str) -> Option<PathBuf> {
    let beside = std::env::var_os("SELVAGE_TEST_PYTHON").map(PathBuf::from);
    let beside = beside.as_deref().and_then(std::path::Path::parent).map(|dir| dir.join(name));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let all = beside.into_iter().chain(std::env::split_paths(&paths).map(|dir| dir.join(name)));
    let found = all.into_iter().find(|path| path.is_file());
    assert!(found.is_some() || std::env::var_os("CI").is_none(), "CI needs {name}: see .ci/tools");
    if found.is_none() {
        eprintln!("\n!!! SKIPPED: {name} is not installed; .ci/tools DIR installs it !!!\n");
    }
    found
}

/// What a program says, and whether it ended well.
async fn run(mut command: Command) -> (bool, String) {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_is_answered_and_old_versions_of_tls_are_not() {
    let Some(curl) = program("curl") else { return };
    let front = Front::start().await;
    let directory = tempfile::tempdir().unwrap();
    let roots = directory.path().join("ca.pem");
    std::fs::write(&roots, front.authority.certificate_pem()).unwrap();
    let port = front.https().port();
    for (flags, want) in [
        (&["--http1.1"][..], Some("200 1.1")),
        (&["--http2"], Some("200 2")),
        (&["--http2", "--tlsv1.3"], Some("200 2")),
        (&["--tls-max", "1.2"], None),
    ] {
        let mut command = Command::new(&curl);
        command.args(["-sS", "-o", "/dev/null", "-w", "%{http_code} %{http_version}", "--cacert"]).arg(&roots);
        command.args(["--resolve", &format!("{HOST}:{port}:127.0.0.1")]).args(flags);
        command.arg(format!("https://{HOST}:{port}/"));
        let (well, said) = run(command).await;
        assert_eq!((well, well.then_some(said.as_str())), (want.is_some(), want), "{flags:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn h2load_gets_every_answer() {
    let Some(h2load) = program("h2load") else { return };
    let front = Front::start().await;
    let port = front.https().port();
    for version in ["h2", "http/1.1"] {
        let mut command = Command::new(&h2load);
        command.args(["-n", "5000", "-c", "20", "-m", "10", "--npn-list", version]);
        command.arg(format!("--connect-to=127.0.0.1:{port}")).arg(format!("https://{HOST}:{port}/"));
        let (well, said) = run(command).await;
        assert!(well && said.contains("5000 succeeded, 0 failed, 0 errored, 0 timeout"), "{version}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chromium_is_answered_over_quic() {
    let Some(chromium) = program("chromium") else { return };
    let front = Front::start().await;
    let identity = front.authority.issue_server(&[HOST.into()], &[]).unwrap();
    front.resolver.swap(Certificates::of([&identity]).unwrap());
    // Over QUIC it believes no authority but the public ones, or this very key.
    let certified = identity.certified_key();
    let key = certified.key.public_key().unwrap();
    let key = STANDARD.encode(digest(&SHA256, &key));
    let (profile, port) = (tempfile::tempdir().unwrap(), front.https().port());
    let mut command = Command::new("timeout");
    command.arg(PATIENCE.as_secs().to_string()).arg(chromium).args(["--headless", "--no-sandbox", "--disable-gpu"]);
    command.arg(format!("--user-data-dir={}", profile.path().display()));
    command.arg(format!("--origin-to-force-quic-on={HOST}:{port}"));
    command.arg(format!("--ignore-certificate-errors-spki-list={key}"));
    command.arg(format!("--host-resolver-rules=MAP {HOST} 127.0.0.1"));
    command.arg("--dump-dom").arg(format!("https://{HOST}:{port}/"));
    let (well, said) = run(command).await;
    assert!(well && said.contains("hello"), "{said}");
    front.counted(r#"selvage_requests_total{app="hello",fault="",outcome="ok",protocol="h3"} "#).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slowhttptest_loses_every_connection_and_takes_the_service_from_nobody() {
    let Some(slowhttptest) = program("slowhttptest") else { return };
    let short =
        Bounds { head_ms: 2_000, idle_ms: 2_000, body_idle_ms: 2_000, write_idle_ms: 2_000, ..Bounds::default() };
    let front = Front::with(short).await;
    // Slow heads, slow bodies, slow readers of 32 MiB. The absolute form names the host, as to a proxy. A reader finds that
    // it was cut off when it has read what its system holds, so it is not slower than it need be to be given up.
    for (flags, path) in [
        (&["-H", "-i", "1"][..], "/"),
        (&["-B", "-i", "1", "-s", "1000000"], "/"),
        (&["-X", "-n", "1", "-w", "10", "-y", "20", "-z", "500"], "/large"),
    ] {
        let mut command = Command::new(&slowhttptest);
        command.args(flags).args(["-c", "50", "-r", "50", "-l", "60", "-p", "30"]);
        command.args(["-d", &format!("127.0.0.1:{}", front.http().port()), "-u", &format!("http://{HOST}{path}")]);
        let (_, said) = run(command).await;
        assert!(said.contains("No open connections left"), "{flags:?}: {said}");
        assert!(!said.contains("available:   NO"), "{flags:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sslyze_finds_nothing_to_complain_of_but_the_test_authority() {
    let Some(sslyze) = program("sslyze") else { return };
    let front = Front::start().await;
    // It also asks without a name.
    let identity = front.authority.issue_server(&[HOST.into()], &[]).unwrap();
    front.resolver.swap(Certificates::of([&identity]).unwrap().with_default(&identity));
    let mut command = Command::new(sslyze);
    command.arg("--mozilla_config=modern").arg(format!("{HOST}:{}{{127.0.0.1}}", front.https().port()));
    let (_, said) = run(command).await;
    assert!(said.contains("TLS_AES_128_GCM_SHA256") && said.contains("OK - Supported"), "{said}");
    let verdict = said.split("COMPLIANCE AGAINST").nth(1).unwrap_or_else(|| panic!("{said}"));
    assert!(!verdict.contains("ERROR"), "{said}");
    for complaint in verdict.lines().map(str::trim).filter(|line| line.starts_with("* ")) {
        assert!(complaint.contains("certificate_path_validation"), "{complaint}\n{verdict}");
    }
}
