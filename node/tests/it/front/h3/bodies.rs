//! Bodies of requests that stop in the middle, where a guest waits for them.

use selvage_config::ComponentName;

use super::raw::{DATA, GOOD, HEADERS, Outcome, Raw, frame, get, head};
use super::*;
use crate::guest::{Active, Guest};

/// H3_REQUEST_INCOMPLETE.
const INCOMPLETE: u64 = 0x10d;
/// How long a client may keep its body back.
const BODY_IDLE_MS: u64 = 500;

/// A front that has a guest and waits for bodies as long.
async fn with_guest(name: &str) -> (Front, Active) {
    let front = Front::with(Bounds { body_idle_ms: BODY_IDLE_MS, ..Bounds::default() }).await;
    let guest = deploy(&front, name).await;
    (front, guest)
}

/// Gives a front's app a guest, for all paths but `/`.
pub(super) async fn deploy(front: &Front, name: &str) -> Active {
    let guest = Guest::new(name).await.activate().unwrap();
    let component: ComponentName = "guest".parse().unwrap();
    let answer = StaticResponse { status_code: 200, headers: BTreeMap::new(), body: Some("hello".into()) };
    let target = Target::Component(component.clone());
    let app = App {
        name: "hello".parse().unwrap(),
        version: None,
        hosts: Vec::new(),
        variables: BTreeMap::new(),
        issuers: BTreeMap::new(),
        routes: vec![
            Route { pattern: "/".parse().unwrap(), target: Target::Static(answer) },
            Route { pattern: "/...".parse().unwrap(), target },
        ],
        components: App::of_component("test".parse().unwrap(), component.clone(), Digest::of(b"guest")).components,
    };
    let pools = BTreeMap::from([(component, Arc::clone(&guest.pool))]);
    let app = ActiveApp::new(app, None, Digest::of(b"manifest"), &pools, &BTreeMap::new()).unwrap();
    front.parts.table.store(Arc::new(Table::new(vec![Arc::new(app)], "edge.test").unwrap()));
    guest
}

/// A request's head, and the first part of a body that announces more.
fn begun(path: &str, bytes: &[u8]) -> Vec<u8> {
    let fields = [(":method", "POST"), GOOD[1], GOOD[2], (":path", path), ("content-length", "100")];
    [head(&fields), frame(DATA, bytes)].concat()
}

/// Reads until a frame of data has come.
async fn data(receive: &mut quinn::RecvStream) -> Vec<u8> {
    let mut came = Vec::new();
    loop {
        let chunk = timeout(PATIENCE, receive.read_chunk(1 << 16, true)).await.unwrap().unwrap();
        came.extend_from_slice(&chunk.expect("the answer goes on").bytes);
        if came.ends_with(b"first half") {
            assert_eq!(came[0], u8::try_from(HEADERS).unwrap());
            return came;
        }
    }
}

#[tokio::test]
async fn a_body_that_stops_in_the_middle_ends_its_request_and_no_other() {
    let (front, _guest) = with_guest("reads_all.wat").await;
    let (raw, _client) = Raw::connect(&front).await;
    let (mut send, receive) = raw.quic.open_bi().await.unwrap();
    send.write_all(&begun("/guest", b"first half")).await.unwrap();
    let whole = [begun("/guest", &[b'x'; 50]), frame(DATA, &[b'x'; 50])].concat();
    let (stopped, beside) = tokio::join!(raw.outcome(receive), raw.ask(&whole));
    assert_eq!((stopped, beside), (Outcome::Reset(INCOMPLETE), Outcome::Status(204)));
    // The client is told to stop sending, with the same code.
    let code = timeout(PATIENCE, send.stopped()).await.unwrap().unwrap();
    assert_eq!(code.map(VarInt::into_inner), Some(INCOMPLETE));
    assert_eq!(raw.ask(&whole).await, Outcome::Status(204), "one after it");
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200), "and one without a guest");
    assert_eq!(raw.quic.close_reason(), None);
    front.counted(r#"{cause="request-incomplete",protocol="h3"} 1"#).await;
    front.counted("selvage_requests_under_way 0").await;
}

#[tokio::test]
async fn an_answer_that_has_begun_is_the_guests_to_end_and_the_client_is_told_to_stop() {
    let (front, _guest) = with_guest("hello").await;
    let (raw, _client) = Raw::connect(&front).await;
    let (mut send, mut receive) = raw.quic.open_bi().await.unwrap();
    send.write_all(&begun("/echo", b"first half")).await.unwrap();
    // It is under way: the guest has sent back what came.
    data(&mut receive).await;
    // This one ends it where the body broke off.
    assert_eq!(timeout(PATIENCE, receive.read_to_end(1 << 16)).await.unwrap().unwrap(), b"");
    let code = timeout(PATIENCE, send.stopped()).await.unwrap().unwrap();
    assert_eq!(code.map(VarInt::into_inner), Some(INCOMPLETE));
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
    front.counted("selvage_requests_under_way 0").await;
}

#[tokio::test]
async fn a_client_of_another_make_hears_the_same_and_goes_on() {
    let (front, _guest) = with_guest("reads_all.wat").await;
    let mut client = connect(&front).await;
    let post = http::Request::post("https://hello.edge.test/guest").body(()).unwrap();
    let mut stream = client.sender.send_request(post).await.unwrap();
    stream.send_data(Bytes::from_static(b"first half")).await.unwrap();
    let ended = timeout(PATIENCE, stream.recv_response()).await.unwrap().unwrap_err();
    let is_incomplete = matches!(&ended, StreamError::RemoteTerminate { code, .. } if code.value() == INCOMPLETE);
    assert!(is_incomplete, "{ended:?}");
    assert_eq!(ask(&mut client, request("https://hello.edge.test/")).await.unwrap().0, 200);
    assert_eq!(client.quic.close_reason(), None);
}
