//! Certificates change while clients come and go.

use rustls::HandshakeKind;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn certificates_change_under_load_without_a_failed_request() {
    let front = Arc::new(Front::start().await);
    let stop = CancellationToken::new();
    let mut clients = JoinSet::new();
    for number in 0..4 {
        let (front, stop) = (Arc::clone(&front), stop.clone());
        clients.spawn(async move {
            // One client keeps its connection, the others shake hands each time, half of them with a ticket.
            let config = Arc::new(front.client(b"http/1.1"));
            let mut kept = h1(front.tls(b"http/1.1").await).await;
            let (mut asked, mut resumed) = (0, 0);
            while !stop.is_cancelled() {
                let mut client = if number == 0 {
                    text(kept.send_request(get("/")).await.unwrap()).await;
                    asked += 1;
                    continue;
                } else {
                    let tcp = TcpStream::connect(front.https()).await.unwrap();
                    let connector = TlsConnector::from(Arc::clone(&config));
                    let stream = connector.connect(ServerName::try_from(HOST).unwrap(), tcp).await.unwrap();
                    resumed += u32::from(stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed));
                    h1(stream).await
                };
                assert_eq!(text(client.send_request(get("/")).await.unwrap()).await, "hello");
                asked += 1;
            }
            (asked, resumed)
        });
    }
    for _ in 0..20 {
        let identity = front.authority.issue_server(&[HOST.into()], &[]).unwrap();
        front.resolver.swap(Certificates::of([&identity]).unwrap());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.cancel();
    let (mut asked, mut resumed) = (0, 0);
    while let Some(done) = clients.join_next().await {
        let (more, again) = done.unwrap();
        assert!(more > 0);
        (asked, resumed) = (asked + more, resumed + again);
    }
    assert!(asked > 20 && resumed > 0, "{asked} requests, {resumed} sessions resumed");
}
