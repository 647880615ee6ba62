// What examples/basket does, for workerd.
export default {
  async fetch(request) {
    const basket = await request.json();
    basket.total = basket.items.reduce((total, item) => total + item.count * item.price, 0);
    return new Response(JSON.stringify(basket), { headers: { "content-type": "application/json" } });
  },
};
