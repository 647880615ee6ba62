//! How a node leaves: what is under way ends, nothing new begins, and what is cut off looks cut off.

use std::time::Instant;

use bytes::Buf;
use tokio::task::JoinHandle;

use super::h3::{ask, connect, request};
use super::*;

/// Long enough for what is under way.
const LONG: Duration = Duration::from_secs(20);

impl Front {
    fn drain(self, time: Duration) -> JoinHandle<()> {
        tokio::spawn(async move { self.listeners.drain(Instant::now() + time).await })
    }
}

/// Waits until nothing new is accepted.
async fn closed(address: SocketAddr) {
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, refused).await.unwrap();
}

#[tokio::test]
async fn http_1_ends_its_answer_and_then_the_connection() {
    let front = Front::start().await;
    let (http, https) = (front.http(), front.https());
    let mut idle = h1(TcpStream::connect(http).await.unwrap()).await;
    text(idle.send_request(get("/")).await.unwrap()).await;
    let mut client = h1(front.tls(b"http/1.1").await).await;
    let response = client.send_request(get("/large")).await.unwrap();
    let parts = Arc::clone(&front.parts);
    let drained = front.drain(LONG);
    closed(http).await;
    closed(https).await;
    assert!(!parts.is_ready());
    assert!(!drained.is_finished(), "an answer is still under way");
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), LARGE_BYTES);
    timeout(PATIENCE, drained).await.unwrap().unwrap();
    assert!(client.send_request(get("/")).await.is_err());
    assert!(idle.send_request(get("/")).await.is_err());
}

#[tokio::test]
async fn an_idle_connection_of_http_1_gets_one_answer_more_which_says_that_it_is_the_last() {
    let front = Front::start().await;
    let parts = Arc::clone(&front.parts);
    let mut idle = h1(TcpStream::connect(front.http()).await.unwrap()).await;
    text(idle.send_request(get("/")).await.unwrap()).await;
    let drained = front.drain(LONG);
    while parts.is_ready() {
        tokio::task::yield_now().await;
    }
    let last = idle.send_request(get("/")).await.unwrap();
    assert_eq!(last.headers()["connection"], "close");
    assert_eq!(text(last).await, "hello");
    timeout(PATIENCE, drained).await.unwrap().unwrap();
    assert!(idle.send_request(get("/")).await.is_err());
}

#[tokio::test]
async fn a_client_that_has_just_connected_is_still_served() {
    let front = Front::start().await;
    let (http, https) = (front.http(), front.https());
    let [one, two, plain] = [https, https, http].map(TcpStream::connect);
    let (one, two, plain) = (one.await.unwrap(), two.await.unwrap(), plain.await.unwrap());
    let connector = |alpn| TlsConnector::from(Arc::new(front.client(alpn)));
    let (connector_1, connector_2) = (connector(b"http/1.1"), connector(b"h2"));
    let parts = Arc::clone(&front.parts);
    let drained = front.drain(LONG);
    while parts.is_ready() {
        tokio::task::yield_now().await;
    }
    let name = ServerName::try_from(HOST).unwrap();
    let (one, two) = tokio::join!(connector_1.connect(name.clone(), one), connector_2.connect(name, two));
    for stream in [h1(one.unwrap()).await.send_request(get("/")), h1(plain).await.send_request(get("/"))] {
        let answer = stream.await.unwrap();
        assert_eq!(answer.headers()["connection"], "close");
        assert_eq!(text(answer).await, "hello");
    }
    let answer = h2(two.unwrap()).await.send_request(get("https://hello.edge.test/")).await.unwrap();
    assert_eq!(text(answer).await, "hello");
    timeout(PATIENCE, drained).await.unwrap().unwrap();
}

#[tokio::test]
async fn http_2_says_goaway_and_ends_its_answers() {
    let front = Front::start().await;
    let https = front.https();
    let mut client = h2(front.tls(b"h2").await).await;
    let response = client.send_request(get("https://hello.edge.test/large")).await.unwrap();
    let drained = front.drain(LONG);
    closed(https).await;
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), LARGE_BYTES);
    timeout(PATIENCE, drained).await.unwrap().unwrap();
    assert!(client.send_request(get("https://hello.edge.test/")).await.is_err());
}

#[tokio::test]
async fn http_3_says_goaway_and_ends_its_answers() {
    let front = Front::start().await;
    let https = front.https();
    let mut client = connect(&front).await;
    let mut stream = client.sender.send_request(request("https://hello.edge.test/large")).await.unwrap();
    stream.finish().await.unwrap();
    stream.recv_response().await.unwrap();
    let drained = front.drain(LONG);
    closed(https).await;
    let mut bytes = 0;
    while let Some(data) = stream.recv_data().await.unwrap() {
        bytes += data.remaining();
    }
    assert_eq!(bytes, LARGE_BYTES);
    timeout(PATIENCE, drained).await.unwrap().unwrap();
    let ended = timeout(PATIENCE, client.ended).await.unwrap().unwrap();
    assert!(ended.is_h3_no_error(), "{ended}");
}

#[tokio::test]
async fn an_answer_that_is_cut_off_is_not_taken_for_a_whole_one() {
    let front = Front::start().await;
    let mut one = h1(front.tls(b"http/1.1").await).await;
    let mut two = h2(front.tls(b"h2").await).await;
    let mut three = connect(&front).await;
    let first = one.send_request(get("/large")).await.unwrap();
    let second = two.send_request(get("https://hello.edge.test/large")).await.unwrap();
    let mut third = three.sender.send_request(request("https://hello.edge.test/large")).await.unwrap();
    third.finish().await.unwrap();
    third.recv_response().await.unwrap();
    let parts = Arc::clone(&front.parts);
    timeout(PATIENCE, front.drain(Duration::from_millis(200))).await.unwrap().unwrap();
    assert!(first.into_body().collect().await.is_err());
    assert!(second.into_body().collect().await.is_err());
    let cut = loop {
        match third.recv_data().await {
            Ok(Some(_)) => {}
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(cut);
    drop(three.quic);
    let metrics = parts.metrics.text();
    assert!(metrics.contains("selvage_requests_under_way 0"), "{metrics}");
}

#[tokio::test]
async fn an_idle_front_drains_at_once() {
    let front = Front::start().await;
    let mut client = connect(&front).await;
    ask(&mut client, request("https://hello.edge.test/")).await.unwrap();
    let silent = TcpStream::connect(front.https()).await.unwrap();
    let mut kept = h2(TcpStream::connect(front.http()).await.unwrap()).await;
    kept.send_request(get("http://hello.edge.test/")).await.unwrap();
    timeout(Duration::from_secs(10), front.drain(LONG)).await.unwrap().unwrap();
    drop(silent);
}
