-- The common case of ledger.place_hold and what T1 asks beside it (tenancy/one_trip.py), in one statement.
-- False: it is not the common case, and nothing has changed. Times in ns, amounts in nano-USD.
CREATE OR REPLACE FUNCTION place_hold_v1(
    p_tenant text, p_project text, p_key text, p_request text, p_hold text, p_gateway text, p_epoch text,
    p_price text, p_model text, p_tier text, p_amount bigint, p_tokens bigint, p_now bigint, p_expires bigint,
    p_day bigint, p_month bigint
) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    one record;
    num_accounts int := 0;
    available bigint := 0;
    scopes text[] := ARRAY[p_tenant, p_project, p_key];
BEGIN
    PERFORM set_config('bulkhead.tenant', p_tenant, true);
    -- The tenant's accounts, the four of a pre-paid tenant in USD, in id order, as everybody takes them. Each statement after this sees what is so now.
    FOR one IN SELECT a.kind, a.balance_nano_usd AS nano FROM account a WHERE a.tenant_id = p_tenant AND a.currency = 'USD'
               ORDER BY a.id FOR UPDATE LOOP
        num_accounts := num_accounts + 1;
        IF one.kind = 'credit' THEN available := one.nano; END IF;
    END LOOP;
    IF num_accounts <> 4 OR available < p_amount THEN RETURN false; END IF;
    -- Tenant and key are active, and the counters that granted the lease are still the right ones.
    PERFORM 1 FROM tenant t
        JOIN api_key k ON k.id = p_key AND k.revoked_ns IS NULL AND (k.expires_ns IS NULL OR p_now < k.expires_ns)
        LEFT JOIN quota_epoch e ON e.organisation_id = t.organisation_id
        WHERE t.id = p_tenant AND t.status = 'active' AND coalesce(e.epoch, '') = p_epoch;
    IF NOT FOUND THEN RETURN false; END IF;
    -- The price is the one in force.
    IF p_price IS DISTINCT FROM (
        SELECT p.id FROM price p
        WHERE p.model = p_model AND p.tier IN (p_tier, 'default') AND p.effective_from_ns <= p_now
          AND NOT EXISTS (SELECT 1 FROM price_withdrawal w WHERE w.price_id = p.id)
          AND p.currency = (SELECT a.currency FROM account a WHERE a.tenant_id = p_tenant AND a.kind = 'credit')
        ORDER BY p.tier <> p_tier, p.effective_from_ns DESC LIMIT 1
    ) THEN RETURN false; END IF;
    -- No credit is due to expire; each budget has its counter, and each hard one covers the amount.
    PERFORM 1 FROM credit c WHERE c.tenant_id = p_tenant AND c.left_nano_usd > 0 AND c.expires_ns <= p_now;
    IF FOUND THEN RETURN false; END IF;
    PERFORM 1 FROM budget b
        LEFT JOIN budget_use u ON u.budget_id = b.id
            AND u.period_start_ns = CASE b.period WHEN 'day' THEN p_day WHEN 'month' THEN p_month ELSE 0 END
        WHERE b.scope_id = ANY (scopes) AND (u.budget_id IS NULL
            OR b.hard AND b.limit_nano_usd::numeric - u.used_nano_usd - u.held_nano_usd < p_amount);
    IF FOUND THEN RETURN false; END IF;
    PERFORM 1 FROM hold h WHERE h.id = p_hold;
    IF FOUND THEN RETURN false; END IF;

    INSERT INTO hold (id, tenant_id, request_id, price_id, amount_nano_usd, state, created_ns, expires_ns,
                      project_id, key_id, num_tokens, gateway_id, tier)
        VALUES (p_hold, p_tenant, p_request, p_price, p_amount, 'pending', p_now, p_expires,
                p_project, p_key, p_tokens, p_gateway, p_tier);
    UPDATE budget_use u SET held_nano_usd = u.held_nano_usd + p_amount FROM budget b
        WHERE u.budget_id = b.id AND b.scope_id = ANY (scopes)
          AND u.period_start_ns = CASE b.period WHEN 'day' THEN p_day WHEN 'month' THEN p_month ELSE 0 END;
    INSERT INTO ledger_transaction (id, tenant_id, kind, hold_id, memo, created_ns)
        VALUES (p_hold || ':hold', p_tenant, 'hold', p_hold, '', p_now);
    INSERT INTO ledger_entry (transaction_id, line, account_id, amount_nano_usd)
        VALUES (p_hold || ':hold', 0, p_tenant || ':credit:USD', -p_amount),
               (p_hold || ':hold', 1, p_tenant || ':held:USD', p_amount);
    UPDATE account a SET balance_nano_usd = a.balance_nano_usd + CASE a.kind WHEN 'held' THEN p_amount ELSE -p_amount END
        WHERE a.id IN (p_tenant || ':credit:USD', p_tenant || ':held:USD');
    RETURN true;
END $$
